"""What came back, appended as it comes: one writer per journal, records that check themselves, torn ends cut.

A journal is two files. `.data` has a line per answer, `CRC JSON`. `.index` has a record of fixed size for
each: which item, where its line is, whether it is an answer or an error, and a check of itself. Who starts
reads the index alone, so that ten million answers are known in seconds; a line counts once it is whole, and
the merge reads and checks every one.

The journal's number is its epoch. Where an item has several answers, the first in order of epoch and position
stands, whoever looks and whenever: a writer that was given up and wakes again can't change what was emitted.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import StorageError
from . import disk

RECORD = np.dtype(
    [
        ("item", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("kind", "<u2"), ("attempts", "<u2"),
        ("prompt", "<u4"), ("output", "<u4"), ("crc", "<u4"),
    ]
)  # fmt: skip
"""Of the index. `prompt` and `output` are tokens; `crc` is the CRC-32 of what comes before it."""
Records = npt.NDArray[Any]
_AT_ONCE = 1 << 18
"""Records in memory."""
_RECORD = struct.Struct("<QQIHHII")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"(\d{6})\.data")


class Kind(IntEnum):
    ANSWER = 0
    ERROR = 1
    DEATH = 2
    """No result: an engine died while this item ran on it."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a journal."""

    item: int
    kind: int
    attempts: int
    status: int = 0
    """HTTP status; 0: nobody answered."""
    request_id: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")
    """The engine's answer, JSON."""
    error: tuple[str, str] | None = None
    """Code and message."""
    prompt_tokens: int = 0
    output_tokens: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


class JournalWriter:
    """Appends to a journal of its own."""

    def __init__(self, directory: Path) -> None:
        """Takes the next free number. Raises StorageError."""
        self.epoch = max(epochs(directory), default=0)
        handle = None
        while handle is None:
            self.epoch += 1
            handle = disk.create(data_path(directory, self.epoch))
        self._data = handle
        self._paths = (data_path(directory, self.epoch), index_path(directory, self.epoch))
        index = disk.create(self._paths[1])
        if index is None:
            raise StorageError(
                f"{self._paths[1]} is there already", hint="remove it: its journal is not there"
            )
        self._index = index
        disk.sync_directory(directory)
        self._offset = 0
        self._unsynced = 0
        self._broken: StorageError | None = None

    @property
    def unsynced(self) -> int:
        """Bytes that were written since the last sync()."""
        return self._unsynced

    def append(self, entry: Entry) -> None:
        """Write one line. Raises StorageError, and does so from then on: nothing may follow a torn line."""
        if self._broken is not None:
            raise self._broken
        text = _encode(entry)
        if b"\n" in text:
            # An engine that writes its JSON over several lines.
            text = _encode(msgspec.structs.replace(entry, body=msgspec.Raw(_compact(entry.body))))
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        index = _RECORD.pack(
            entry.item, self._offset, len(line), entry.kind, min(entry.attempts, 0xFFFF),
            entry.prompt_tokens, entry.output_tokens,
        )  # fmt: skip
        try:
            disk.append(self._data, line, self._paths[0])
            disk.append(self._index, index + _CRC.pack(zlib.crc32(index)), self._paths[1])
        except StorageError as error:
            self._broken = error
            raise
        self._offset += len(line)
        self._unsynced += len(line)

    def sync(self) -> None:
        """All lines are on the disk when it returns. Raises StorageError; may run in a thread."""
        if self._broken is not None:
            raise self._broken
        self._unsynced = 0
        try:
            disk.sync(self._data, self._paths[0])
            disk.sync(self._index, self._paths[1])
        except StorageError as error:
            self._broken = error
            raise

    def close(self) -> None:
        """Raises StorageError."""
        try:
            if self._broken is None:
                self.sync()
        finally:
            os.close(self._data)
            os.close(self._index)


class JournalReader:
    """What one journal says, as far as it is whole."""

    def __init__(self, directory: Path, epoch: int) -> None:
        self.epoch = epoch
        self._data = data_path(directory, epoch)
        self._index = index_path(directory, epoch)
        self._read = 0
        """Bytes of the index that were read."""
        self._end = 0
        """Of the last line that the index names."""
        self._void = _void(directory, epoch)

    def more(self) -> Iterator[Records]:
        """The records that came since the last call, some at a time. Raises StorageError."""
        while len(found := self._next()):
            yield self._standing(found)

    def _next(self) -> Records:
        try:
            size = os.stat(self._data).st_size
            with open(self._index, "rb") as file:
                file.seek(self._read)
                data = file.read(_AT_ONCE * RECORD.itemsize)
        except FileNotFoundError:
            return np.empty(0, RECORD)  # its writer has just begun
        except OSError as error:
            raise disk.failed(error, "read") from error
        # A torn end, or one that did not reach the disk before the power went, is cut.
        found = np.frombuffer(data, RECORD, _whole(data))
        behind = found["offset"] + found["length"] > size
        if behind.any():
            found = found[: int(np.argmax(behind))]
        self._read += len(found) * RECORD.itemsize
        if len(found):
            self._end = int(found["offset"][-1]) + int(found["length"][-1])
        return found

    def lost_lines(self) -> Records:
        """Whole lines behind the last that the index names: it was cut, and they were not.

        For a journal whose writer has ended. Raises StorageError.
        """
        rows = []
        try:
            with open(self._data, "rb") as file:
                file.seek(self._end)
                at = self._end
                for line in file:
                    entry = parse(line)
                    if entry is not None:
                        rows.append(
                            (entry.item, at, len(line), entry.kind, entry.attempts, entry.prompt_tokens,
                             entry.output_tokens, 0)
                        )  # fmt: skip
                    at += len(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise disk.failed(error, "read") from error
        return self._standing(np.array(rows, RECORD))

    def _standing(self, records: Records) -> Records:
        """Without those whose lines turned out to be damaged."""
        if not len(self._void):
            return records
        return records[~np.isin(records["offset"], self._void)]


class Lines:
    """Reads single lines of journals, and checks them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[int, int] = {}

    def read(self, epoch: int, offset: int, length: int) -> Entry | None:
        """None for a line that is not whole. Raises StorageError."""
        path = data_path(self._directory, epoch)
        try:
            if epoch not in self._handles:
                self._handles[epoch] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return parse(os.pread(self._handles[epoch], length, offset))
        except OSError as error:
            error.filename = str(path)
            raise disk.failed(error, "read") from error

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def parse(line: bytes) -> Entry | None:
    """A line's entry; None where it is torn or damaged."""
    if len(line) < 11 or not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    text = line[9:-1]
    try:
        if int(line[:8], 16) != zlib.crc32(text):
            return None
        return _decode(text)
    except ValueError:
        return None


def epochs(directory: Path) -> Iterator[int]:
    """Of the journals that are there, in no order. Raises StorageError."""
    try:
        for entry in os.scandir(directory):
            found = _NAME.fullmatch(entry.name)
            if found is not None:
                yield int(found[1])
    except OSError as error:
        raise disk.failed(error, "read") from error


def set_aside(directory: Path, epoch: int, offsets: list[int]) -> None:
    """Have lines of a journal not count any more, for they are damaged. Raises StorageError."""
    before = _void(directory, epoch).tolist()
    void = np.array(sorted({*before, *offsets}), "<u8")
    disk.write_whole(_void_path(directory, epoch), void.tobytes())


def _void(directory: Path, epoch: int) -> npt.NDArray[Any]:
    try:
        return np.fromfile(_void_path(directory, epoch), "<u8")
    except FileNotFoundError:
        return np.empty(0, "<u8")


def _void_path(directory: Path, epoch: int) -> Path:
    return directory / f"{epoch:06d}.void"


def data_path(directory: Path, epoch: int) -> Path:
    return directory / f"{epoch:06d}.data"


def index_path(directory: Path, epoch: int) -> Path:
    return directory / f"{epoch:06d}.index"


def _compact(body: msgspec.Raw) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(body))


def _whole(data: bytes) -> int:
    """How many index records from the start of `data` are whole."""
    size = RECORD.itemsize
    count = len(data) // size
    view = memoryview(data)
    for number in range(count):
        end = (number + 1) * size
        if zlib.crc32(view[end - size : end - _CRC.size]) != _CRC.unpack_from(data, end - _CRC.size)[0]:
            return number
    return count
