"""What each key used, as a relay counts it until the supervisor has it."""

from __future__ import annotations

from collections.abc import Mapping

from .identity import Identity

Item = tuple[str, str, str, int, int, int, int]
"""Key id, name, model, requests, prompt tokens, cached ones of these, completion tokens."""


class Meter:
    """Counts, hands over, and knows how much a key has used in all."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], list[int]] = {}
        self._told: Mapping[str, int] = {}
        self._since: dict[str, int] = {}

    def count(
        self,
        identity: Identity,
        model: str,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
    ) -> None:
        """One request."""
        key = (identity.key, identity.name, model)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0, 0, 0, 0]
        counts[0] += 1
        counts[1] += prompt_tokens
        counts[2] += cached_tokens
        counts[3] += completion_tokens
        if identity.limits.tokens_total is not None:
            used = prompt_tokens + completion_tokens
            self._since[identity.key] = self._since.get(identity.key, 0) + used

    def take(self) -> list[Item]:
        """What was counted since the last call."""
        items = [
            (*key, requests, prompt, cached, completion)
            for key, (requests, prompt, cached, completion) in self._counts.items()
        ]
        self._counts.clear()
        return items

    def told(self, totals: Mapping[str, int]) -> None:
        """The ledger's totals: tokens by key id, over all runs."""
        self._told = totals
        self._since.clear()

    def total(self, key: str) -> int:
        """Tokens a key has used, as far as this relay knows; other relays' last seconds may be missing."""
        return self._told.get(key, 0) + self._since.get(key, 0)
