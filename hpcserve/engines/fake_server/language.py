"""The toy language model: the next token is a pure function of the tokens before it.

The state is a rolling hash, so a prompt followed by part of its own answer continues exactly as the
first run did. The KV bytes of a token are its state, which lets a decode engine check that the bytes
it pulled are those of its own prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

from . import tokens

_MASK = (1 << 64) - 1
_WORDS = tuple(
    tokens.encode(f" {consonant}{vowel}")[0] for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"
)
# An emoji is two tokens: the first three of its four bytes, and the last one.
_FIRST_HALVES = tuple(tokens.encode(f"{chr(0x1F300 + 64 * row)}")[0] for row in range(10))
_LAST_HALVES = tuple(tokens.encode(chr(0x1F300 + place))[1] for place in range(64))
_HALF_SET = frozenset(_FIRST_HALVES)
_WORD_SET = frozenset(_WORDS + _FIRST_HALVES + _LAST_HALVES)
LANGUAGES = ("words", "emoji")
_LONGEST_ANSWER = 256
_MEAN_ANSWER = 48


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class State:
    """What the model remembers: a hash of all tokens, how many generated words end the text, and whether it
    ends with half of a character."""

    __slots__ = ("half", "hash", "words")

    def __init__(self, model: str) -> None:
        self.hash = _mix(crc32(model.encode()) + 1)
        self.words = 0
        self.half = False

    def feed(self, token: int) -> None:
        self.hash = _mix(self.hash ^ (token + 0x9E3779B97F4A7C15))
        self.words = self.words + 1 if token in _WORD_SET else 0
        self.half = token in _HALF_SET

    def feed_all(self, ids: Iterable[int]) -> State:
        for token in ids:
            self.feed(token)
        return self


def salt(seed: int | None, sample: int) -> int:
    """What makes samples differ: sample i of a seed is sample 0 of seed + i, as in vLLM.

    Nothing for the first sample without a seed.
    """
    if seed is None:
        return _mix(2 * sample) if sample else 0
    return _mix(2 * (seed + sample) + 1 & _MASK)


def next_token(state: State, sample_salt: int, speech: str = "words") -> int:
    """One of the toy words, or half an emoji."""
    number = _mix(state.hash ^ sample_salt)
    if speech == "words":
        return _WORDS[number % len(_WORDS)]
    halves = _LAST_HALVES if state.half else _FIRST_HALVES
    return halves[number % len(halves)]


def wants_to_stop(state: State, sample_salt: int) -> bool:
    """True where an answer of no given length ends: about every 48 words, never after 256."""
    if state.words == 0 or state.half:
        return False
    return state.words >= _LONGEST_ANSWER or _mix(state.hash ^ sample_salt ^ 0x5DEECE66D) % _MEAN_ANSWER == 0


def logprob(state: State, sample_salt: int, rank: int) -> tuple[int, float]:
    """The token of a rank (0 is the sampled one) and its log probability, falling with rank."""
    start = _mix(state.hash ^ sample_salt) % len(_WORDS)
    noise = (_mix(state.hash ^ rank) % 1000) / 10000
    return _WORDS[(start + rank) % len(_WORDS)], -(0.05 + 1.5 * rank + noise)


def kv_chunk(state: State, ids: Iterable[int], bytes_per_token: int) -> bytes:
    """KV bytes of `ids`, `bytes_per_token` each, advancing `state` past them."""
    repeat, rest = divmod(bytes_per_token, 8)
    chunks: list[bytes] = []
    for token in ids:
        state.feed(token)
        word = state.hash.to_bytes(8, "big")
        chunks.append(word * repeat + word[:rest])
    return b"".join(chunks)


def embedding(model: str, ids: Iterable[int], dimensions: int) -> list[float]:
    """A unit vector that depends on all tokens."""
    value = State(model).feed_all(ids).hash
    raw: list[float] = []
    for _ in range(dimensions):
        value = _mix(value + 0x9E3779B97F4A7C15 & _MASK)
        raw.append(value / (1 << 63) - 1.0)
    norm = sum(x * x for x in raw) ** 0.5
    return [x / norm for x in raw]
