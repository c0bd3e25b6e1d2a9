"""One prompt being answered: its tokens, its KV blocks, its text so far."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from . import language, tokens
from .kv_cache import hash_block

FinishReason = Literal["stop", "length", "abort", "error"]
Status = Literal["waiting", "loading", "loaded", "running", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How long and how an answer is. `ends_by_itself` lets the toy model stop (no max_tokens was given)."""

    max_tokens: int
    ends_by_itself: bool
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    salt: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a step added to a sequence; `text` may lag the tokens while a stop string could begin."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    """What the client is told of an `error`; None: nothing."""


class Listener(Protocol):
    """Who gets the answer. Called from the scheduler's step: must not block and must not raise."""

    def on_output(self, sequence: Sequence, output: Output) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Times:
    """When things happened to a sequence, on the monotonic clock (s)."""

    arrived: float
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class Sequence:
    """Tokens and state of one prompt's answer; the scheduler moves it through its `status`."""

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        prompt: list[int],
        sampling: Sampling,
        listener: Listener,
        now: float,
        index: int = 0,
        kv_params: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        n: int = 1,
        speech: str = "words",
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.n = n
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.listener = listener
        self.kv_params = kv_params or {}
        self.cache_salt = cache_salt
        self.status: Status = "waiting"
        self.times = Times(arrived=now)
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.cached_blocks = 0
        self.computed = 0
        self.local_hit = 0
        self.external_hit = 0
        self.preemptions = 0
        self.number = 0
        """Which of all that its scheduler was given."""
        self.given: tuple[int, ...] = ()
        """The first tokens of the answer, where another engine has sampled them."""
        self.loads_remotely = bool(self.kv_params.get("do_remote_prefill"))
        self.result_kv_params: dict[str, Any] | None = None
        self.logprobs: list[list[tuple[int, float]]] = []
        self.holds_stops = True
        """Text in which a stop string could begin waits for the rest of it."""
        self._speech = speech
        # As in an engine: bytes of a character wait for the rest of it.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = language.State(model).feed_all(prompt)
        self._text = ""
        self._sent = 0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that needed no computing here."""
        return self.local_hit + self.external_hit

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def text(self) -> str:
        """The answer's text, whole once the sequence has finished."""
        return self._text

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first `count` full blocks."""
        while len(self.hashes) < count:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else None
            salt = self.cache_salt if parent is None else None
            self.hashes.append(hash_block(parent, tuple(self.tokens[start : start + block_size]), salt))
        return self.hashes[:count]

    def sample(self) -> Output:
        """The next token and what it means for the client."""
        sampling, state = self.sampling, self._state
        if sampling.logprobs is not None:
            ranks = range(max(sampling.logprobs, 1))
            self.logprobs.append([language.logprob(state, sampling.salt, rank) for rank in ranks])
        if self.output_length < len(self.given):
            token = self.given[self.output_length]
        elif (
            sampling.ends_by_itself
            and self.output_length >= sampling.min_tokens
            and language.wants_to_stop(state, sampling.salt)
        ):
            token = tokens.EOS
        else:
            token = language.next_token(state, sampling.salt, self._speech)
        state.feed(token)
        self.tokens.append(token)
        return self._output(token)

    def _output(self, token: int) -> Output:
        sampling = self.sampling
        before = len(self._text)
        self._text += self._decoder.decode(tokens.token_bytes(token, special=False))
        finish: FinishReason | None = None
        stop_reason: int | str | None = None
        if self.output_length > sampling.min_tokens or self.output_length >= sampling.max_tokens:
            if token == tokens.EOS:
                finish = "stop"
            elif token in sampling.stop_token_ids:
                finish, stop_reason = "stop", token
            elif (found := self._find_stop(before)) is not None:
                finish, stop_reason = "stop", found
        if finish is None and self.output_length >= sampling.max_tokens:
            finish = "length"
        end = len(self._text)
        if finish is None and sampling.stop and self.holds_stops:
            end = max(self._sent, end - max(map(len, sampling.stop)) + 1)
        delta = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return Output(text=delta, tokens=(token,), finish_reason=finish, stop_reason=stop_reason)

    def _find_stop(self, before: int) -> str | None:
        """The first stop string that the newest text completes; cuts the text there."""
        for stop in self.sampling.stop:
            place = self._text.find(stop, max(0, before - len(stop) + 1))
            if place >= 0:
                self._text = self._text[: place + (len(stop) if self.sampling.include_stop else 0)]
                return stop
        return None


@dataclass(slots=True, kw_only=True)
class Work:
    """What one step computes for one sequence."""

    sequence: Sequence
    count: int

    @property
    def decode(self) -> bool:
        """One token costs a decode step, be it an answer's or the last of a prompt."""
        return self.count == 1
