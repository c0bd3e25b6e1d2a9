"""A placement and its reasons, as `hpcserve why-route` and the response header show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from ..workers import Worker


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One worker, or one pair of workers, that could have served the request."""

    worker: str
    """`decode-0`, or `prefill-1+decode-0` for a pair."""
    cost: float
    """Seconds; the lowest wins."""
    terms: Mapping[str, float] = {}
    """Seconds by name: what `cost` is the sum of."""
    cached_tokens: int = 0


class Shown(Protocol):
    """What a decision kept to explain itself, should anybody ask."""

    def candidates(self) -> tuple[Candidate, ...]:
        """As they were when it was made; best first, at most a handful."""
        ...


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome: one worker, or a pair."""

    answering: Worker
    """The aggregated or decode worker."""
    prefill: Worker | None = None
    """None: the answering worker computes the prompt itself."""
    policy: str = ""
    reason: str = ""
    """In plain words where the costs alone do not tell: `session`, `only one worker`, …"""
    uncached_tokens: int = 0
    """Prompt tokens that will have to be computed."""
    cached_tokens: int = 0
    shown: Shown | None = None
    seconds: float = 0.0
    """What the decision took."""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Best first; made anew each time."""
        return () if self.shown is None else self.shown.candidates()
