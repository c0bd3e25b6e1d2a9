"""Who does which part of the work: stretches of the order, claimed one after another.

A claim says where it begins and ends, and its number follows that of the claim before: two who claim at once
ask for the same number, and the file system lets one of them have it. Stretches are long at first and short
at the end, by what is left and by how many take part, so that all finish together; nobody has to know in
advance how many they will be.

When the order is used up, what was claimed by those who are gone and is not done becomes the next round's
work. Claims save work and decide nothing: an item that two did has two answers, and the journals say which
stands.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import StorageError
from . import disk

LONGEST = 2000
SHORTEST = 16
_SHARES = 4
"""A stretch is this part of each member's share of what is left."""
_CLAIM = re.compile(r"(\d{4})\.(\d{6})")
_WORK = re.compile(r"(\d{4})\.work")
Items = npt.NDArray[Any]


class Claim(msgspec.Struct, frozen=True):
    """A stretch of a round's work."""

    start: int
    end: int
    member: str


class Claims:
    """All claims of one batch, as one member sees them."""

    def __init__(self, directory: Path, order: Items, member: str, alive: Callable[[str], bool]) -> None:
        self._directory = directory
        self._order = order
        self._member = member
        self._alive = alive
        self._round = -1
        self._work: Items = order
        self._number = 0
        self._end = 0
        self._find_round()

    @property
    def round(self) -> int:
        return self._round

    @property
    def unclaimed(self) -> int:
        """Items of the round that nobody had claimed when this was looked at last."""
        return max(0, len(self._work) - self._end)

    def take(self, members: int) -> Items | None:
        """The next stretch, for one of so many `members`; None when the round's work is all claimed.

        Raises StorageError.
        """
        while True:
            self._catch_up()
            left = self.unclaimed
            if not left:
                return None
            size = min(left, max(SHORTEST, min(LONGEST, left // (_SHARES * max(1, members)))))
            claim = Claim(self._end, self._end + size, self._member)
            if disk.write_new(self._path(self._number + 1), msgspec.json.encode(claim)):
                return np.array(self._work[claim.start : claim.end])

    def renew(self, done: npt.NDArray[np.bool_]) -> bool:
        """Begin a round with what is neither `done` nor in the hands of another that lives.

        False: there is no such item. Raises StorageError.
        """
        self._catch_up()
        free = ~done
        for items in self._held_by_others():
            free[items] = False
        work = self._order[free[self._order]]
        if not len(work):
            return False
        # When another one was quicker, its round is as good.
        disk.write_new(self._directory / f"{self._round + 1:04d}.work", work.tobytes())
        self._find_round()
        return True

    def begun(self) -> bool:
        """Has anything been claimed yet?"""
        self._catch_up()
        return self._round > 0 or self._number > 0

    def _held_by_others(self) -> Iterator[Items]:
        alive: dict[str, bool] = {self._member: False}
        rounds: dict[int, Items] = {self._round: self._work}
        for number, claim in self._all():
            if claim.member not in alive:
                alive[claim.member] = self._alive(claim.member)
            if alive[claim.member]:
                if number not in rounds:
                    rounds[number] = self._work_of(number)
                yield rounds[number][claim.start : claim.end]

    def _all(self) -> Iterator[tuple[int, Claim]]:
        for name in self._names():
            found = _CLAIM.fullmatch(name)
            if found is not None:
                claim = self._read(self._directory / name)
                if claim is not None:
                    yield int(found[1]), claim

    def _find_round(self) -> None:
        rounds = (_WORK.fullmatch(name) for name in self._names())
        latest = max((int(found[1]) for found in rounds if found is not None), default=0)
        if latest != self._round:
            self._round, self._work = latest, self._work_of(latest)
            self._number = self._end = 0

    def _work_of(self, number: int) -> Items:
        if number == 0:
            return self._order
        path = self._directory / f"{number:04d}.work"
        try:
            return np.fromfile(path, self._order.dtype)
        except OSError as error:
            error.filename = str(path)
            raise disk.failed(error, "read") from error

    def _catch_up(self) -> None:
        """Look for claims that others made, and for their rounds."""
        self._find_round()
        while (claim := self._read(self._path(self._number + 1))) is not None:
            self._number += 1
            self._end = claim.end

    def _path(self, number: int) -> Path:
        return self._directory / f"{self._round:04d}.{number:06d}"

    def _read(self, path: Path) -> Claim | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Claim)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk.failed(error, "read") from error
        except msgspec.DecodeError as error:
            raise StorageError(
                f"{path} is damaged: {error}", hint="remove that file; its rows are done anew"
            ) from error

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory)
        except OSError as error:
            raise disk.failed(error, "read") from error
