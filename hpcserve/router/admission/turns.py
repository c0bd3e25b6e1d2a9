"""Whose turn it is among the processes of one router.

Room at the engines is seen first by the process whose request ends, and a connection stays with the process
that accepted it. Without more, who came to the process where more runs would be served before the others,
whatever the keys' counters say. So each process shows on the board who is next in its queue, and one whose
next request comes after another's leaves room to it. The other looks for room every few milliseconds; one
that has stopped looking holds nobody up.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..board import Board

STOPPED = 1.0
"""Seconds since a process looked, after which nobody waits for it. A busy machine may stall one."""
_TIE = 0.05
"""Seconds between arrivals of one key that count as none, so that processes need not always take turns."""


@dataclass(frozen=True, slots=True)
class Head:
    """Who is next in the queue of a process."""

    rank: int
    """Of its class, above 0; higher goes first."""
    key: int
    """Number of the cell with its key's counter."""
    arrived: float
    """Seconds of the machine's monotonic clock."""


class Turns:
    """This process's view."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._rank = board.cell("turn rank")
        self._key = board.cell("turn key")
        self._arrived = board.cell("turn arrived")
        self._looked = board.cell("turn looked")

    def show(self, head: Head | None, now: float) -> None:
        """Who is next here; None: nobody."""
        if self._board.processes == 1:
            return
        if head is not None:
            self._key.put(head.key)
            self._arrived.put(head.arrived)
            self._looked.put(now)
        self._rank.put(head.rank if head is not None else 0)

    def yields(self, head: Head, now: float, slack: float) -> bool:
        """Another process's next request goes before `head`; between keys, by more than `slack` tokens."""
        board = self._board
        if board.processes == 1:
            return False
        ranks, keys = self._rank.shares(), self._key.shares()
        arrived, looked = self._arrived.shares(), self._looked.shares()
        counter = board.numbered(head.key).total
        for process, rank in enumerate(ranks):
            if process == board.process or rank == 0 or now - looked[process] > STOPPED:
                continue
            key = int(keys[process])
            if rank != head.rank:
                if rank > head.rank:
                    return True
            elif key == head.key:
                if arrived[process] + _TIE < head.arrived:
                    return True
            elif board.numbered(key).total + slack < counter:
                return True
        return False
