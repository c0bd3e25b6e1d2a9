"""Who is next when not all fit: strict classes, and inside a class fair shares between keys, in tokens.

Each key has a counter of the tokens it was let in with, divided by its weight; the key with the lowest one
is next. A key that comes back after a pause starts at the virtual time, the counter of the key served last,
so that a pause earns nothing (virtual token counters: Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024). Counters lie on the board, hence are the same in all processes; so does how many requests
of a key wait anywhere, for a key that waits in another process has not paused.

A class that waits behind a higher one gets one part in sixteen of the tokens, so that nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from ..board import Cell

SPARED = 1 / 16
"""Part of the tokens that a lower class gets while a higher one is waiting, too."""


class Entry:
    """One request that waits. Subclassed by whoever waits."""

    __slots__ = ("cost", "flow", "priority", "queued", "weight")

    def __init__(self, flow: str, *, weight: float, priority: int, cost: float) -> None:
        self.flow = flow
        """The key."""
        self.weight = weight
        self.priority = priority
        self.cost = cost
        """Tokens."""
        self.queued = False


class _Flow:
    """One key's requests of one class."""

    __slots__ = ("backlog", "entries", "everywhere", "service", "weight")

    def __init__(self, service: Cell, everywhere: Cell, weight: float) -> None:
        self.service = service
        self.everywhere = everywhere
        """Requests of the key that wait, in all processes."""
        self.weight = weight
        self.entries: deque[Entry] = deque()
        self.backlog = 0.0
        """Tokens."""


class _Class:
    __slots__ = ("backlog", "flows", "owed", "priority")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.flows: dict[str, _Flow] = {}
        """Those with requests waiting."""
        self.backlog = 0.0
        self.owed = 0.0
        """Tokens of the spared part that were not used yet."""


class FairQueue:
    """Requests that wait, of one process."""

    def __init__(self, cell: Callable[[str], Cell]) -> None:
        self._cell = cell
        self._now = cell("fair")
        """The virtual time."""
        self._services: dict[str, Cell] = {}
        self._charges: dict[str, float] = {}
        """Tokens by weight that are not on the counters yet."""
        self._classes: list[_Class] = []
        """Highest priority first."""
        self.waiting = 0

    @property
    def backlog(self) -> float:
        """Tokens that wait."""
        return sum(level.backlog for level in self._classes)

    def charge(self, flow: str, weight: float, cost: float) -> None:
        """A key was let in with `cost` tokens, or these turned out to be so many more, or (below 0) less."""
        # Kept for `settle()`: while nobody waits, this is all that fairness costs a request.
        self._charges[flow] = self._charges.get(flow, 0.0) + cost / weight

    def settle(self) -> None:
        """Put what was charged on the counters of all processes: now and then, and before they count."""
        for flow, amount in self._charges.items():
            service = self._service(flow)
            if amount > 0.0 and not self.waiting:
                # Nobody had to wait, so nobody is behind: the virtual time goes along.
                end = max(service.total, self._now.total) + amount
                service.add(end - service.total)
                self._now.add(end - self._now.total)
            else:
                service.add(amount)
        self._charges.clear()

    def _service(self, flow: str) -> Cell:
        service = self._services.get(flow)
        if service is None:
            service = self._services[flow] = self._cell(f"fair {flow}")
        return service

    def push(self, entry: Entry) -> None:
        self.settle()
        level = self._level(entry.priority)
        flow = level.flows.get(entry.flow)
        if flow is None:
            everywhere = self._cell(f"fair waiting {entry.flow}")
            flow = level.flows[entry.flow] = _Flow(self._service(entry.flow), everywhere, entry.weight)
            behind = self._now.total - flow.service.total
            if behind > 0.0 and everywhere.total < 1.0:
                flow.service.add(behind)
        flow.entries.append(entry)
        flow.backlog += entry.cost
        level.backlog += entry.cost
        flow.everywhere.add(1.0)
        entry.queued = True
        self.waiting += 1

    def head(self) -> Entry | None:
        """Who is next; None when nobody waits."""
        return self._choose()[0]

    def pop(self) -> Entry | None:
        """Let the next one in, and charge its key."""
        entry, chosen = self._choose()
        if entry is None or chosen is None:
            return None
        for level in self._classes:
            if level.priority < entry.priority and level.flows:
                level.owed += entry.cost * SPARED
        if any(level.priority > entry.priority and level.flows for level in self._classes):
            chosen.owed -= entry.cost
        self.remove(entry)
        service = self._service(entry.flow)
        self._now.add(max(0.0, service.total - self._now.total))
        service.add(entry.cost / entry.weight)
        return entry

    def _choose(self) -> tuple[Entry | None, _Class | None]:
        self.settle()
        first: tuple[Entry, _Class] | None = None
        for level in self._classes:
            if not level.flows:
                continue
            entry = min(level.flows.values(), key=_counter).entries[0]
            if level.owed >= entry.cost:
                return entry, level
            first = first or (entry, level)
        return first or (None, None)

    def remove(self, entry: Entry) -> None:
        """Take one out that waits; nothing of it is left."""
        if not entry.queued:
            return
        entry.queued = False
        level = self._level(entry.priority)
        flow = level.flows[entry.flow]
        if flow.entries[0] is entry:
            flow.entries.popleft()
        else:
            flow.entries.remove(entry)
        flow.backlog -= entry.cost
        flow.everywhere.add(-1.0)
        level.backlog -= entry.cost
        self.waiting -= 1
        if not flow.entries:
            del level.flows[entry.flow]
            if not level.flows:
                # Rounding must not pile up, and a class that wanted nothing is owed nothing.
                level.backlog = level.owed = 0.0

    def ahead(self, entry: Entry) -> float:
        """Tokens of its class that would be let in before `entry`, were it pushed now and the last."""
        self.settle()
        level = self._level(entry.priority)
        own = level.flows.get(entry.flow)
        tokens = own.backlog if own is not None else 0.0
        start = max(self._service(entry.flow).total, self._now.total)
        finish = start + (tokens + entry.cost) / entry.weight
        for name, flow in level.flows.items():
            if name != entry.flow:
                tokens += min(flow.backlog, max(0.0, (finish - flow.service.total) * flow.weight))
        return tokens

    def above(self, priority: int) -> float:
        """Tokens that wait in higher classes."""
        return sum(level.backlog for level in self._classes if level.priority > priority)

    def waits(self, priority: int) -> bool:
        """Somebody of this class does."""
        return bool(self._level(priority).flows)

    def _level(self, priority: int) -> _Class:
        for level in self._classes:
            if level.priority == priority:
                return level
        level = _Class(priority)
        self._classes.append(level)
        self._classes.sort(key=lambda other: -other.priority)
        return level

    def __iter__(self) -> Iterator[Entry]:
        for level in self._classes:
            for flow in level.flows.values():
                yield from flow.entries


def _counter(flow: _Flow) -> float:
    return flow.service.total
