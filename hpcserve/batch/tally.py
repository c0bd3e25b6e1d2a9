"""Which items have a result by now, as all journals say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import StorageError
from .journal import JournalReader, Kind, Records, epochs, set_aside


class Tally:
    """One byte per item."""

    def __init__(self, directory: Path, items: int) -> None:
        self._directory = directory
        self._readers: dict[int, JournalReader] = {}
        self.done = np.zeros(items, np.bool_)
        self.deaths: dict[int, int] = {}
        """Engine deaths that an item was in flight at, where there were any."""

    @property
    def left(self) -> int:
        return len(self.done) - int(np.count_nonzero(self.done))

    def look(self, *, but: int = 0) -> None:
        """Take in what is new in all journals, but for the one of epoch `but`. Raises StorageError."""
        for epoch in sorted(epochs(self._directory)):
            if epoch != but:
                first = epoch not in self._readers
                reader = self._readers.setdefault(epoch, JournalReader(self._directory, epoch))
                for records in reader.more():
                    self._take(records)
                if first:
                    self._take(reader.lost_lines())

    def mark(self, item: int, kind: Kind) -> None:
        """What this process wrote itself."""
        if kind is Kind.DEATH:
            self.deaths[item] = self.deaths.get(item, 0) + 1
            return
        self.done[item] = True

    def _take(self, records: Records) -> None:
        if not len(records):
            return
        if int(records["item"].max()) >= len(self.done):
            raise StorageError(
                f"a journal in {self._directory} is about another batch",
                hint="give another output directory with -o, or remove this one",
            )
        for item in records["item"][records["kind"] == Kind.DEATH]:
            self.deaths[int(item)] = self.deaths.get(int(item), 0) + 1
        self.done[records["item"][records["kind"] != Kind.DEATH]] = True


class Standing:
    """Where the one result of each item is: the first answer in order of epoch and position, else the last
    error. Everybody who looks at the same journals finds the same."""

    def __init__(self, directory: Path, items: int) -> None:
        """Raises StorageError."""
        self.epoch = np.zeros(items, np.uint32)
        """0: the item has no result."""
        self.offset = np.zeros(items, np.uint64)
        self.length = np.zeros(items, np.uint32)
        self.is_error = np.zeros(items, np.bool_)
        self.results = 0
        """Of all items together: what is beyond one each was computed again."""
        for epoch, records in _all_records(directory):
            self._take(epoch, records)

    @property
    def missing(self) -> int:
        return int(np.count_nonzero(self.epoch == 0))

    def _take(self, epoch: int, records: Records) -> None:
        self.results += int(np.count_nonzero(records["kind"] != Kind.DEATH))
        answers = records[records["kind"] == Kind.ANSWER]
        items, first = np.unique(answers["item"], return_index=True)
        news = (self.epoch[items] == 0) | self.is_error[items]
        self._put(epoch, answers[first[news]], is_error=False)
        errors = records[records["kind"] == Kind.ERROR]
        items, last = np.unique(errors["item"][::-1], return_index=True)
        news = (self.epoch[items] == 0) | self.is_error[items]
        self._put(epoch, errors[::-1][last[news]], is_error=True)

    def _put(self, epoch: int, records: Records, *, is_error: bool) -> None:
        items = records["item"]
        self.epoch[items] = epoch
        self.offset[items] = records["offset"]
        self.length[items] = records["length"]
        self.is_error[items] = is_error


def forget_errors(directory: Path, items: int) -> int:
    """Have the errors in the journals not count any more; how many items had nothing better. Raises
    StorageError."""
    failed = int(np.count_nonzero(Standing(directory, items).is_error))
    aside: dict[int, list[int]] = {}
    for epoch, records in _all_records(directory):
        aside.setdefault(epoch, []).extend(records["offset"][records["kind"] == Kind.ERROR].tolist())
    for epoch, offsets in aside.items():
        if offsets:
            set_aside(directory, epoch, offsets)
    return failed


def _all_records(directory: Path) -> Iterator[tuple[int, Records]]:
    for epoch in sorted(epochs(directory)):
        reader = JournalReader(directory, epoch)
        yield from ((epoch, records) for records in reader.more())
        yield epoch, reader.lost_lines()
