"""Joins prompt chunks, which the router hashes, with token units, which engines announce.

No tokenizer: an engine that answers says which tokens it made of the prompt, and a chunk's end is put at
the same share of the tokens as it has of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ...engines.kv_events.units import UNIT, token_bytes, units_of
from .table import Table

if TYPE_CHECKING:
    from ..demand import Demand

_MOST_ENDS = 20_000
"""Prompts whose next turn is learned from where the last one ended: about 200 bytes each."""


class _End(NamedTuple):
    """How far a prompt was learned: its text of ids begins the next turn's as well."""

    number: int
    """Of the last unit."""
    unit: int
    offset: int
    """In the text, behind that unit."""


_decode = msgspec.json.Decoder(list[int]).decode


class Translation:
    """`most` chunks; the oldest go."""

    def __init__(self, *, most: int) -> None:
        self._table = Table("Q", most=most)
        self.get = self._table.get
        """The hash of the last unit inside of a chunk's prefix; None while it isn't known."""
        self._ends: dict[int, _End] = {}
        """By the last chunk that was learned of a prompt."""

    def __len__(self) -> int:
        return len(self._table)

    def known(self, chain: Sequence[int]) -> int:
        """How many chunks from the start can be translated."""
        get = self.get
        low, high = 0, len(chain)
        if get(chain[0]) is None:
            return 0
        if get(chain[-1]) is not None:
            return high
        while low < high:
            middle = (low + high) // 2
            if get(chain[middle]) is None:
                high = middle
            else:
                low = middle + 1
        return low

    def learn(self, demand: Demand, prompt_token_ids: bytes, most: int) -> list[tuple[int, int]]:
        """Of the first `most` chunks, those not known yet; returns what was new, chunk and unit.

        The ids are as in a JSON array without its brackets; ValueError when they are no such thing. Only
        the ids of new chunks are read: all of a long prompt's would take a quarter of a millisecond.
        """
        chain, seed = demand.chain, demand.space
        if seed is None or not chain or most <= 0:
            return []
        known = self.known(chain)
        if known >= most:
            return []
        # Number of the first unit that is read, and where it begins in the text.
        first, start = 0, 0
        end = self._ends.get(chain[known - 1]) if known else None
        if end is not None and end.offset < len(prompt_token_ids):
            first, start, seed = end.number + 1, end.offset, end.unit
        # A chunk is put at the same share of the ids' text as it has of the prompt's bytes.
        text_per_chunk = len(prompt_token_ids) * demand.chunk_tokens / demand.prompt_tokens
        cut = prompt_token_ids.find(b",", int(most * text_per_chunk))
        text = prompt_token_ids[start : cut if cut >= 0 else None]
        count, units = _units(text, seed)
        text_per_token = len(text) / max(count, 1)
        learned = []
        unit, number = seed, first - 1
        for at in range(known, most):
            tokens = ((at + 1) * text_per_chunk - start) / text_per_token
            number = first + min(max(int(tokens) // UNIT, 0 if first else 1), len(units)) - 1
            if number < 0:
                break
            if number >= first:
                unit = units[number - first]
            self._table.put(chain[at], unit)
            learned.append((chain[at], unit))
        if learned and len(learned) == most - known:
            offset = start + _offset(text, (number + 1 - first) * UNIT, text_per_token)
            self._end(chain[most - 1], _End(number, unit, offset))
        return learned

    def take(self, pairs: Sequence[tuple[int, int]]) -> None:
        """What another process has learned."""
        for chunk, unit in pairs:
            self._table.put(chunk, unit)

    def _end(self, chunk: int, end: _End) -> None:
        if len(self._ends) >= _MOST_ENDS:
            del self._ends[next(iter(self._ends))]
        self._ends[chunk] = end


def _units(ids: bytes, seed: int) -> tuple[int, list[int]]:
    """How many ids there are, and the units of them."""
    try:
        numbers = _decode(b"[%b]" % ids)
        return len(numbers), units_of(token_bytes(numbers), seed)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise ValueError(f"prompt_token_ids: {error}") from error


def _offset(ids: bytes, number: int, text_per_token: float) -> int:
    """Where in the text id `number` begins."""
    if number <= 0:
        return 0
    at = int(number * text_per_token)
    seen = ids.count(b",", 0, at)
    while seen > number - 1:
        at = ids.rindex(b",", 0, at)
        seen -= 1
    while seen < number:
        following = ids.find(b",", at)
        if following < 0:
            return len(ids) + 1
        at = following + 1
        seen += 1
    return at
