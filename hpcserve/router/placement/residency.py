"""What placement asks of the index of KV caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..demand import Demand


class Held(Protocol):
    """Leading chunks of a prompt that a worker holds, by where they are."""

    @property
    def gpu(self) -> int: ...
    @property
    def cpu(self) -> int: ...
    @property
    def storage(self) -> int: ...


class Residency(Protocol):
    """Which worker holds what: known from engines' events, or predicted."""

    def matches(self, chain: Sequence[int], *, now: float) -> Mapping[str, Held]:
        """By worker's name, for each that holds at least the first chunk."""
        ...

    def predict(self, worker: str, demand: Demand, *, now: float) -> None:
        """`worker` is sent this prompt: it will hold it soon."""
        ...


class NoResidency:
    """For endpoints where no prompt's cache is known."""

    def matches(self, chain: Sequence[int], *, now: float) -> Mapping[str, Held]:
        return {}

    def predict(self, worker: str, demand: Demand, *, now: float) -> None:
        pass
