"""What a decision saw of the workers it shows: enough to take their costs apart, should anybody ask.

Most decisions are never looked at, so figures are kept, and terms are made of them when somebody asks.
"""

from __future__ import annotations

import msgspec

from . import cost
from .decision import Candidate
from .pool import Read

_OF_PREFILL = ("prefill", "behind", "disturbance")


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One worker."""

    worker: str
    load: Read
    uncached: int
    """Tokens of this prompt that it would have to compute."""
    prefill: float
    decode: float
    """Tokens a second."""
    loading: float
    """Seconds to read cached blocks back from slower memory; below zero: it has none there."""
    session: bool
    """It answered the session last."""


class Seen(msgspec.Struct, frozen=True, gc=False):
    """Workers of one pool, and what was the same for all of them."""

    prompt_tokens: int
    output_tokens: int
    behind: float
    stall: float
    """cost.stall_factor(); below zero: no answer is written in this pool."""
    copied: float
    least: int
    """Uncached tokens of the worker that holds most of the prompt."""
    readings: tuple[Reading | None, ...]
    """Best first; None where a pair has no worker of this pool."""

    def terms(self, reading: Reading) -> dict[str, float]:
        """The cost of one worker, taken apart."""
        wait, streams, usage, _, _ = reading.load
        seconds = reading.uncached / reading.prefill
        found = {
            "wait": wait,
            "prefill": seconds,
            "behind": seconds * (self.behind - 1.0),
            "disturbance": seconds * cost.PER_STREAM * streams,
            "barrier": cost.barrier(usage),
        }
        if self.stall >= 0.0:
            factor = cost.prefill_factor(self.behind, streams)
            found["stall"] = self.output_tokens / reading.decode * self.stall / factor
            found["decode"] = cost.decode(streams, self.output_tokens)
        if self.copied:
            # What computing another copy of a popular beginning gives back.
            missing = reading.uncached - self.least
            found["copy"] = -self.copied * missing * (self.behind - 1.0) / reading.prefill
        if reading.loading >= 0.0:
            found["loading"] = reading.loading
        if reading.session:
            found["session"] = -cost.SESSION * reading.uncached / reading.prefill
        return found

    def candidates(self) -> tuple[Candidate, ...]:
        return tuple([self.candidate(reading) for reading in self.readings if reading is not None])

    def candidate(self, reading: Reading) -> Candidate:
        return self._candidate(reading.worker, self.terms(reading), reading.uncached)

    def pair(self, own: Reading, other: Seen, first: Reading, transfer: float) -> Candidate:
        """One of these workers that writes the answer after `first` has computed the prompt."""
        terms = other.terms(first)
        for name, seconds in self.terms(own).items():
            if name not in _OF_PREFILL:
                terms[name] = terms.get(name, 0.0) + seconds
        terms["transfer"] = transfer
        terms["two_legs"] = cost.TWO_LEGS
        return self._candidate(f"{first.worker}+{own.worker}", terms, first.uncached)

    def _candidate(self, worker: str, terms: dict[str, float], uncached: int) -> Candidate:
        cached = max(self.prompt_tokens - uncached, 0)
        return Candidate(worker=worker, cost=sum(terms.values()), terms=terms, cached_tokens=cached)


class SeenPairs(msgspec.Struct, frozen=True, gc=False):
    """Decode workers, each alone or behind a prefill worker."""

    own: Seen
    other: Seen
    transfers: tuple[float, ...]
    """Seconds, for each pair."""

    def candidates(self) -> tuple[Candidate, ...]:
        found: list[Candidate] = []
        own, other = self.own, self.other
        for second, first, transfer in zip(own.readings, other.readings, self.transfers, strict=True):
            assert second is not None
            found.append(own.candidate(second) if first is None else own.pair(second, other, first, transfer))
        return tuple(found)
