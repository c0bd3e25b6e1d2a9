"""Rows on their way: which goes next, which wait to be tried again, and which are held back."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .spool import Spooled

_DOUBTFUL = 16
"""Rows that were in flight when an engine died run so many at a time: should one of them have been the cause,
few others are under suspicion next time."""
_ALONE = 2
"""Deaths after which a row runs while nothing else does."""
HOPELESS = 3
"""Deaths after which it is an error."""


@dataclass(slots=True)
class Row:
    """One item in progress."""

    request: Spooled
    attempts: int = 0
    """Answers that were failures, this process's own."""
    deaths: int = 0
    tokens: float = 0.0
    """What it takes of the budget."""
    doubtful: bool = False
    """In flight as one of those that may have killed an engine."""

    @property
    def alone(self) -> bool:
        return self.deaths >= _ALONE


class Queue:
    """The rows that are not in flight. Times are those of the event loop."""

    def __init__(self, fresh: Callable[[], Iterator[Row] | None]) -> None:
        """`fresh()` gives the next stretch of rows that nobody has; None: there are no more."""
        self._fresh = fresh
        self._stretch: Iterator[Row] = iter(())
        self._next: Row | None = None
        self._later: list[tuple[float, int, Row]] = []
        self._doubtful: deque[Row] = deque()
        self._suspects: deque[Row] = deque()
        self._doubtful_running = 0
        self._count = 0
        self.used_up = False
        """There are no more fresh rows."""

    def peek(self, now: float, running: int) -> Row | None:
        """The row that goes next; None: none may go now. `running` rows are in flight."""
        if self._doubtful and self._doubtful_running < _DOUBTFUL:
            return self._doubtful[0]
        if self._later and self._later[0][0] <= now:
            return self._later[0][2]
        if self._next is None and not self.used_up:
            self._next = self._fetch()
        if self._next is not None:
            return self._next
        if self._suspects and not running and not self._later and not self._doubtful:
            return self._suspects[0]
        return None

    def pop(self, row: Row) -> None:
        """It goes: the one that `peek()` gave."""
        if row is self._next:
            self._next = None
        elif self._doubtful and row is self._doubtful[0]:
            self._doubtful.popleft()
            self._doubtful_running += 1
            row.doubtful = True
        elif self._later and row is self._later[0][2]:
            heapq.heappop(self._later)
        else:
            self._suspects.popleft()

    def back(self, row: Row, at: float) -> None:
        """Try it again, not before `at`."""
        self._count += 1
        heapq.heappush(self._later, (at, self._count, row))

    def died(self, row: Row) -> None:
        """An engine died with it in flight."""
        (self._suspects if row.alone else self._doubtful).append(row)

    def landed(self, row: Row) -> None:
        """It is in flight no more."""
        if row.doubtful:
            row.doubtful = False
            self._doubtful_running -= 1

    @property
    def due(self) -> float | None:
        """When the next one that waits may be tried again."""
        return self._later[0][0] if self._later else None

    @property
    def waiting(self) -> int:
        return len(self._later) + len(self._doubtful) + len(self._suspects)

    def _fetch(self) -> Row | None:
        while True:
            row = next(self._stretch, None)
            if row is not None:
                return row
            stretch = self._fresh()
            if stretch is None:
                self.used_up = True
                return None
            self._stretch = stretch


def pause(attempt: int) -> float:
    """Seconds before a row is tried again after so many failures: doubling, with a spread so that many rows
    do
    not come back at one moment."""
    return min(60.0, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
