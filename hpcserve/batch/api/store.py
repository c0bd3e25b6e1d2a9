"""All files and batches of a run: in memory, and each in a file that is written whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from ...errors import StorageError
from .. import disk
from ..work import make_directory
from .layout import ApiDir
from .records import BatchRecord, FileRecord

Record = FileRecord | BatchRecord
R = TypeVar("R", FileRecord, BatchRecord)


class Store:
    def __init__(self, directory: ApiDir) -> None:
        """Reads what is there, and removes what a process that was killed left half done. Raises
        StorageError."""
        self.dir = directory
        for path in (directory.root, directory.files, directory.batches):
            make_directory(path)
        self.files = _read(directory.files, FileRecord)
        self.batches = _read(directory.batches, BatchRecord)
        numbers = [file.number for file in self.files.values()]
        numbers += [batch.number for batch in self.batches.values()]
        self._next = 1 + max(numbers, default=0)
        # Two writes of one record must not meet, nor overtake each other.
        self._writing = asyncio.Lock()
        self._sweep()

    def number(self) -> int:
        """Of the next record."""
        number, self._next = self._next, self._next + 1
        return number

    async def save(self, record: Record) -> None:
        """Returns when it is on the disk. Raises StorageError."""
        async with self._writing:
            data = msgspec.json.format(msgspec.json.encode(record), indent=1)
            await asyncio.to_thread(disk.write_whole, self._path(record), data)
        self._known(record)

    def _known(self, record: Record) -> None:
        if isinstance(record, FileRecord):
            self.files[record.id] = record
        else:
            self.batches[record.id] = record

    async def remove(self, file: FileRecord) -> None:
        """Forget a file, and delete what is in it. Raises StorageError."""
        self.files.pop(file.id, None)
        await asyncio.to_thread(self._unlink, (self._path(file), self.content(file)))

    def content(self, file: FileRecord) -> Path:
        return self.dir.root / file.path

    def unfinished(self) -> list[BatchRecord]:
        """The oldest first."""
        return sorted(
            (batch for batch in self.batches.values() if not batch.over), key=lambda batch: batch.number
        )

    def needed(self, file: str) -> BatchRecord | None:
        """A batch that is not over and has this input."""
        return next((batch for batch in self.unfinished() if batch.input_file_id == file), None)

    def _path(self, record: Record) -> Path:
        folder = self.dir.files if isinstance(record, FileRecord) else self.dir.batches
        return folder / f"{record.id}.json"

    def _unlink(self, paths: Iterable[Path]) -> None:
        try:
            for path in paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise disk.failed(error, "remove") from error

    def _sweep(self) -> None:
        """Uploads that were not finished, and temporary files: one process at a time works here."""
        whole = {self.content(file) for file in self.files.values()}
        left = [path for path in self.dir.files.glob("*.jsonl") if path not in whole]
        for folder in (self.dir.files, self.dir.batches):
            left += folder.glob(".*")
        self._unlink(left)


def _read(folder: Path, kind: type[R]) -> dict[str, R]:
    found: dict[str, R] = {}
    for path in folder.glob("[!.]*.json"):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=kind)
        except OSError as error:
            raise disk.failed(error, "read") from error
        except msgspec.DecodeError as error:
            raise StorageError(
                f"{path} is damaged: {error}", hint="remove that file: what it describes is lost then"
            ) from error
        found[record.id] = record
    return found


def page(
    records: Iterable[R], *, after: str | None, limit: int, newest_first: bool = True
) -> tuple[list[R], bool]:
    """At most `limit` of them, from behind the one with the id `after`, and whether there are more. Raises
    KeyError when there is no such one."""
    ordered = sorted(records, key=lambda record: record.number, reverse=newest_first)
    if after is not None:
        places = {record.id: place for place, record in enumerate(ordered)}
        ordered = ordered[places[after] + 1 :]
    return ordered[:limit], len(ordered) > limit
