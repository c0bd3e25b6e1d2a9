"""Who is next when not all fit: strict classes, and inside a class fair shares between keys, in tokens.

Each key has a counter of the tokens it was let in with, divided by its weight; the key with the lowest one
is next. A key that comes back after a pause starts at the virtual time, the counter of the key served last,
so that a pause earns nothing (virtual token counters: Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024). Counters lie on the board, hence are the same in all processes; so does how many requests
of a key and of a class wait anywhere, for who waits in another process has not paused. See `turns` for the
order between processes.

A class that waits behind a higher one gets one part in sixteen of the tokens, so that nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..board import Board, Cell
from ..keys.identity import BATCH, INTERACTIVE
from .turns import Head, Turns

SPARED = 1 / 16
"""Part of the tokens that a lower class gets while a higher one is waiting, too."""
_RANKS = {INTERACTIVE: 2, BATCH: 1}
_OWED = 3
"""Rank of a class that is served for what it is owed."""


class Entry:
    """One request that waits. Subclassed by whoever waits."""

    __slots__ = ("arrived", "cost", "flow", "priority", "queued", "weight")

    def __init__(self, flow: str, *, weight: float, priority: int, cost: float) -> None:
        self.flow = flow
        """The key."""
        self.weight = weight
        self.priority = priority
        self.cost = cost
        """Tokens."""
        self.arrived = 0.0
        """Seconds of the machine's monotonic clock."""
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
    __slots__ = ("backlog", "everywhere", "flows", "owed", "priority", "rank")

    def __init__(self, priority: int, board: Board) -> None:
        self.priority = priority
        self.rank = _RANKS[priority]
        self.flows: dict[str, _Flow] = {}
        """Those with requests waiting here."""
        self.everywhere = board.cell(f"fair class {priority}")
        """Requests that wait, in all processes."""
        self.backlog = 0.0
        self.owed = board.cell(f"fair owed {priority}")
        """Tokens of the spared part that were not used yet, in all processes."""


class FairQueue:
    """Requests that wait, of one process."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._now = board.cell("fair")
        """The virtual time."""
        self._turns = Turns(board)
        self._services: dict[str, Cell] = {}
        self._charges: dict[str, float] = {}
        """Tokens by weight that are not on the counters yet."""
        self._classes = tuple(_Class(priority, board) for priority in _RANKS)
        """Highest priority first."""
        self.waiting = 0
        self._everywhere = board.cell("fair waiting")

    @property
    def backlog(self) -> float:
        """Tokens that wait here."""
        return sum(level.backlog for level in self._classes)

    @property
    def waiting_anywhere(self) -> bool:
        """In this or another process."""
        return self.waiting > 0 or self._everywhere.total > 0.0

    def charge(self, flow: str, weight: float, cost: float) -> None:
        """A key was let in with `cost` tokens, or these turned out to be so many more, or (below 0) less."""
        # Kept for `settle()`: while nobody waits, this is all that fairness costs a request.
        self._charges[flow] = self._charges.get(flow, 0.0) + cost / weight

    def settle(self) -> None:
        """Put what was charged on the counters of all processes: now and then, and before they count."""
        if not self._charges:
            return
        waiting = self.waiting_anywhere
        for flow, amount in self._charges.items():
            service = self._service(flow)
            if amount > 0.0 and not waiting:
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
            service = self._services[flow] = self._board.cell(f"fair key {flow}")
        return service

    def push(self, entry: Entry) -> None:
        self.settle()
        level = self._level(entry.priority)
        flow = level.flows.get(entry.flow)
        if flow is None:
            everywhere = self._board.cell(f"fair waiting {entry.flow}")
            flow = level.flows[entry.flow] = _Flow(self._service(entry.flow), everywhere, entry.weight)
            behind = self._now.total - flow.service.total
            if behind > 0.0 and everywhere.total < 1.0:
                flow.service.add(behind)
        flow.entries.append(entry)
        flow.backlog += entry.cost
        level.backlog += entry.cost
        entry.queued = True
        self._count(flow, level, 1)

    def _count(self, flow: _Flow, level: _Class, requests: int) -> None:
        self.waiting += requests
        for cell in (flow.everywhere, level.everywhere, self._everywhere):
            cell.add(requests)

    def head(self) -> Entry | None:
        """Who is next here; None when nobody waits."""
        chosen = self._choose()
        return chosen[0] if chosen is not None else None

    def yields(self, now: float, slack: float) -> bool:
        """Another process has who goes before `head()`; in the same class, by more than `slack` tokens."""
        chosen = self._choose()
        return chosen is not None and self._turns.yields(self._shown(*chosen), now, slack)

    def show(self, now: float) -> None:
        """Tell other processes who is next here: after each change, and now and then while somebody waits."""
        chosen = self._choose()
        self._turns.show(self._shown(*chosen) if chosen is not None else None, now)

    def _shown(self, entry: Entry, level: _Class) -> Head:
        owed = level.owed.total >= entry.cost
        return Head(_OWED if owed else level.rank, self._service(entry.flow).number, entry.arrived)

    def _above(self, priority: int) -> Iterator[_Class]:
        return (level for level in self._classes if level.priority > priority)

    def pop(self) -> Entry | None:
        """Let the next one in, and charge its key."""
        chosen = self._choose()
        if chosen is None:
            return None
        entry, level = chosen
        for lower in self._classes:
            if lower.priority < entry.priority and lower.everywhere.total > 0.0:
                lower.owed.add(entry.cost * SPARED)
        if any(higher.everywhere.total > 0.0 for higher in self._above(entry.priority)):
            level.owed.add(-entry.cost)
        self.remove(entry)
        service = self._service(entry.flow)
        self._now.add(max(0.0, service.total - self._now.total))
        service.add(entry.cost / entry.weight)
        return entry

    def _choose(self) -> tuple[Entry, _Class] | None:
        self.settle()
        first: tuple[Entry, _Class] | None = None
        for level in self._classes:
            if not level.flows:
                continue
            entry = min(level.flows.values(), key=_counter).entries[0]
            if level.owed.total >= entry.cost:
                return entry, level
            first = first or (entry, level)
        return first

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
        level.backlog -= entry.cost
        self._count(flow, level, -1)
        if not flow.entries:
            del level.flows[entry.flow]
            if not level.flows:
                level.backlog = 0.0  # rounding must not pile up
            if level.everywhere.total < 1.0:
                level.owed.add(-level.owed.total)  # a class that wanted nothing is owed nothing

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
        return sum(level.backlog for level in self._above(priority))

    def waits(self, priority: int) -> bool:
        """Somebody of this class does."""
        return bool(self._level(priority).flows)

    def _level(self, priority: int) -> _Class:
        for level in self._classes:
            if level.priority == priority:
                return level
        raise ValueError(f"no class has priority {priority}")

    def __iter__(self) -> Iterator[Entry]:
        for level in self._classes:
            for flow in level.flows.values():
                yield from flow.entries


def _counter(flow: _Flow) -> float:
    return flow.service.total
