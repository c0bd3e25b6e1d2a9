"""Figures that all router processes of one endpoint share: each worker's load, and admission's budgets.

They lie in memory without a name that the supervisor makes and its relays inherit as a file descriptor.
Every figure has one float64 per process; a process writes its own alone, so nothing is locked, and reads
the sum of all. An aligned float64 is written and read in one piece. With one process nothing is shared, and
a figure is a plain attribute.

Layout: `SLOTS * len(NAMES) + CELLS` figures of `processes` float64 each, then one 16-byte digest of a name
for each cell.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import PlanError

NAMES = ("in_flight", "prefill_tokens", "kv_tokens")
SLOTS = 1024
"""Workers that can be in rotation at once."""
CELLS = 16384
"""Named figures."""
_FIGURES = SLOTS * len(NAMES) + CELLS
_FLOAT = 8
_DIGEST = 16
_UNUSED = bytes(_DIGEST)


class Load:
    """What runs on one worker, summed over all processes. Change it with `add()` alone."""

    __slots__ = ("in_flight", "kv_tokens", "prefill_tokens")

    in_flight: float
    """Exchanges."""
    prefill_tokens: float
    """Prompt tokens to compute whose request has had no first byte yet."""
    kv_tokens: float
    """Tokens of prompts and expected answers that run."""

    def __init__(self) -> None:
        self.in_flight = 0.0
        self.prefill_tokens = 0.0
        self.kv_tokens = 0.0

    def read(self) -> tuple[float, float, float]:
        """All three at once: `in_flight`, `prefill_tokens`, `kv_tokens`."""
        return self.in_flight, self.prefill_tokens, self.kv_tokens

    def add(self, in_flight: float = 0.0, prefill_tokens: float = 0.0, kv_tokens: float = 0.0) -> None:
        """Change this process's share; give back what was added with negative numbers."""
        self.in_flight += in_flight
        self.prefill_tokens += prefill_tokens
        self.kv_tokens += kv_tokens


class Cell:
    """One named figure, summed over all processes."""

    __slots__ = ("number", "total")

    total: float
    number: int
    """The same in every process: see Board.numbered."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.total = 0.0

    def add(self, amount: float) -> None:
        """Change this process's share."""
        self.total += amount

    def put(self, share: float) -> None:
        """Set this process's share."""
        self.total = share

    def shares(self) -> list[float]:
        """Each process's."""
        return [self.total]


class Board:
    """The figures as one process sees them. `Board()` is one for a process without company."""

    process = 0
    """This one's number."""
    processes = 1

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        self._numbered: dict[int, Cell] = {}

    def load(self, slot: int | None) -> Load:
        """The load of the worker in `slot`; processes agree on slots. None: known to this process alone."""
        return Load()

    def cell(self, name: str) -> Cell:
        """The figure called `name`, the same one in every process. Raises PlanError when all are taken."""
        cell = self._cells.get(name)
        if cell is None:
            cell = self._cells[name] = self._new_cell(name)
            self._numbered[cell.number] = cell
        return cell

    def numbered(self, number: int) -> Cell:
        """The figure with that number, which some process has asked for by its name."""
        cell = self._numbered.get(number)
        if cell is None:
            cell = self._numbered[number] = self._find_cell(number)
        return cell

    def _new_cell(self, name: str) -> Cell:
        return Cell(len(self._cells))

    def _find_cell(self, number: int) -> Cell:
        raise LookupError(f"no figure has the number {number}")


class SharedBoard(Board):
    """The figures of several processes.

    `process` is this one's number, from 0; the supervisor, which only clears, has none.
    """

    def __init__(self, fd: int, *, processes: int, process: int | None = None) -> None:
        super().__init__()
        self._fd = fd
        self.processes = processes
        self.process = process or 0
        self._map = mmap.mmap(fd, _size(processes))
        end = _FIGURES * processes * _FLOAT
        self._figures = memoryview(self._map)[:end].cast("d")
        self._names = memoryview(self._map)[end:]

    @classmethod
    def create(cls, processes: int) -> SharedBoard:
        """A new one, all zero; children inherit `fd`. Only touched pages take memory."""
        fd = os.memfd_create("hpcserve-router-board")
        os.ftruncate(fd, _size(processes))
        return cls(fd, processes=processes)

    @property
    def fd(self) -> int:
        return self._fd

    def load(self, slot: int | None) -> Load:
        if slot is None:
            return Load()
        if not 0 <= slot < SLOTS:
            raise PlanError(
                f"worker slot {slot} does not exist: a router takes {SLOTS} workers",
                hint="run a second router for the rest",
            )
        return _SharedLoad(self._figures, slot * len(NAMES), self.processes, self.process)

    def clear(self, process: int) -> None:
        """Forget what a process that died had counted."""
        self._figures[process :: self.processes] = memoryview(bytes(_FIGURES * _FLOAT)).cast("d")

    def close(self) -> None:
        self._figures.release()
        self._names.release()
        self._map.close()
        os.close(self._fd)

    def _new_cell(self, name: str) -> Cell:
        number = self._number(hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest())
        if number is None:
            raise PlanError(
                f"all {CELLS} shared figures of the router are taken",
                hint="restart the router: figures of revoked keys are only freed then",
            )
        return self._find_cell(number)

    def _find_cell(self, number: int) -> Cell:
        return _SharedCell(self._figures, number, self.processes, self.process)

    def _number(self, digest: bytes) -> int | None:
        with self._locked():
            for number in range(CELLS):
                found = bytes(self._names[number * _DIGEST : (number + 1) * _DIGEST])
                if found == digest:
                    return number
                if found == _UNUSED:
                    self._names[number * _DIGEST : (number + 1) * _DIGEST] = digest
                    return number
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock of this kind goes with its process, however that ends.
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)


def _size(processes: int) -> int:
    return _FIGURES * processes * _FLOAT + CELLS * _DIGEST


class _SharedLoad(Load):
    __slots__ = ("_figures", "_first", "_own", "_processes")

    def __init__(self, figures: memoryview[float], figure: int, processes: int, process: int) -> None:
        self._figures = figures
        self._first = figure * processes
        self._own = self._first + process
        self._processes = processes

    @property
    def in_flight(self) -> float:  # type: ignore[override]
        first = self._first
        return sum(self._figures[first : first + self._processes])

    @property
    def prefill_tokens(self) -> float:  # type: ignore[override]
        first = self._first + self._processes
        return sum(self._figures[first : first + self._processes])

    @property
    def kv_tokens(self) -> float:  # type: ignore[override]
        first = self._first + 2 * self._processes
        return sum(self._figures[first : first + self._processes])

    def read(self) -> tuple[float, float, float]:
        first, count = self._first, self._processes
        # One copy out of the map: its items one by one cost more than the sums.
        found = self._figures[first : first + 3 * count].tolist()
        return sum(found[:count]), sum(found[count : 2 * count]), sum(found[2 * count :])

    def add(self, in_flight: float = 0.0, prefill_tokens: float = 0.0, kv_tokens: float = 0.0) -> None:
        figures, own, step = self._figures, self._own, self._processes
        figures[own] += in_flight
        figures[own + step] += prefill_tokens
        figures[own + 2 * step] += kv_tokens


class _SharedCell(Cell):
    __slots__ = ("_figures", "_first", "_own", "_processes")

    def __init__(self, figures: memoryview[float], number: int, processes: int, process: int) -> None:
        self.number = number
        self._figures = figures
        self._first = (SLOTS * len(NAMES) + number) * processes
        self._own = self._first + process
        self._processes = processes

    @property
    def total(self) -> float:  # type: ignore[override]
        return sum(self._figures[self._first : self._first + self._processes])

    def add(self, amount: float) -> None:
        self._figures[self._own] += amount

    def put(self, share: float) -> None:
        self._figures[self._own] = share

    def shares(self) -> list[float]:
        return list(self._figures[self._first : self._first + self._processes])
