"""How far a worker is with the prompts that this process sent it."""

from __future__ import annotations

from collections import deque

from .facts import Rates

_LEAST_SAMPLE = 1024
"""Tokens: shorter prefills measure a step's overhead rather than the rate."""


class Queue:
    """One worker's prompts without a first byte, oldest first, and when the oldest one's turn came."""

    __slots__ = ("_rates", "head", "sent", "since")

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        """The worker's; what is seen of its prefills is told there."""
        self.sent: deque[int] = deque()
        """Uncached tokens of each."""
        self.head = 0
        """Of the oldest."""
        self.since = 0.0

    def began(self, uncached_tokens: int, now: float) -> None:
        if not self.sent:
            self.since = now
            self.head = uncached_tokens
        self.sent.append(uncached_tokens)

    def ended(self, uncached_tokens: int, now: float, seconds: float | None) -> None:
        """`seconds` after it was sent. The time since its turn came is a sample of the worker's rate."""
        sent = self.sent
        sent.remove(uncached_tokens)
        self.head = sent[0] if sent else 0
        if seconds is None:
            return
        took = min(seconds, now - self.since)
        self.since = now
        if uncached_tokens >= _LEAST_SAMPLE:
            self._rates.observe("prefill", uncached_tokens, took)
