"""How far into a prompt workers' caches reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec


class Match(msgspec.Struct, frozen=True, gc=False):
    """Leading chunks of a prompt that a worker holds."""

    gpu: int
    cpu: int = 0
    """Chunks after those in GPU memory that must be read from the host's."""
    storage: int = 0
    """And after those, from disk or beyond."""

    @property
    def chunks(self) -> int:
        return self.gpu + self.cpu + self.storage


def levels(holding: Callable[[int], int], length: int) -> Iterator[tuple[int, int]]:
    """(n, bits that are set at 0 … n-1 and not at n), for each n that has any, in no order.

    `holding(i)` should have a bit only where `holding(i - 1)` has it; so few calls tell all.
    """
    first = holding(0)
    if not first:
        return
    last = holding(length - 1) & first
    if last:
        yield length, last
    waiting = [(0, first, length - 1, last)]
    while waiting:
        low, at_low, high, at_high = waiting.pop()
        if at_low == at_high:
            continue
        if high - low <= 1:
            yield low + 1, at_low & ~at_high
            continue
        middle = (low + high) // 2
        at_middle = holding(middle) & at_low | at_high
        waiting.append((low, at_low, middle, at_middle))
        waiting.append((middle, at_middle, high, at_high))
