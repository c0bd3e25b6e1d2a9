"""Rendered requests on disk: written once while planning, read by item in any order.

Rendering anew for every job would need the input in random order, which a compressed file does not give; and
a request that was written down can't change between two jobs. A record is
PATH, custom_id and BODY with tabs between them, one a line.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import StorageError
from . import disk
from .prompts import Request

_FILE_SIZE = 1 << 30
_BUFFER = 1 << 20
PLACE = np.dtype([("file", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("prompt", "<u4"), ("most", "<u4")])
"""Of one item: where its request is, its prompt's tokens, and the most that it may answer (0: not said)."""
_PLACE = struct.Struct("<IIQII")
Places = npt.NDArray[Any]


class Spooled(NamedTuple):
    """One request, to be sent."""

    item: int
    path: str
    body: bytes
    prompt_tokens: int
    most: int
    """Tokens that the answer may have; 0: not said."""
    custom_id: str | None
    """What the client calls it, in OpenAI batch lines."""


class SpoolWriter:
    """Takes the requests of items 0, 1, 2 and so on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places = self._open(directory / "places.bin")
        self._file = -1
        self._number = -1
        self._offset = _FILE_SIZE
        self._data = bytearray()
        self._rows = bytearray()
        self.items = 0

    def _open(self, path: Path) -> int:
        handle = disk.create(path)
        if handle is None:
            raise StorageError(f"{path} is there already", hint="remove it; nothing else uses it")
        return handle

    def add(self, request: Request, prompt_tokens: int) -> None:
        """The next item's request. Raises StorageError."""
        if self._offset >= _FILE_SIZE:
            self._next_file()
        name = b"" if request.custom_id is None else msgspec.json.encode(request.custom_id)
        record = b"%b\t%b\t%b\n" % (request.path.encode("ascii"), name, request.body)
        self._data += record
        self._rows += _PLACE.pack(
            self._number, len(record), self._offset, prompt_tokens, request.max_tokens or 0
        )
        self._offset += len(record)
        self.items += 1
        if len(self._data) > _BUFFER:
            self._flush()

    def _next_file(self) -> None:
        self._flush()
        if self._file >= 0:
            disk.sync(self._file, self._data_path)
            os.close(self._file)
        self._number += 1
        self._offset = 0
        self._file = self._open(self._data_path)

    @property
    def _data_path(self) -> Path:
        return _data(self._directory, self._number)

    def _flush(self) -> None:
        if self._data:
            disk.append(self._file, self._data, self._data_path)
        if self._rows:
            disk.append(self._places, self._rows, self._directory / "places.bin")
        self._data.clear()
        self._rows.clear()

    def close(self) -> None:
        """All of it is on the disk then. Raises StorageError."""
        self._flush()
        for handle, path in ((self._file, self._data_path), (self._places, self._directory / "places.bin")):
            if handle >= 0:
                disk.sync(handle, path)
                os.close(handle)
        self._file = self._places = -1


class Spool:
    """The requests of a planned batch."""

    def __init__(self, directory: Path) -> None:
        """Raises StorageError."""
        self._directory = directory
        self._handles: dict[int, int] = {}
        try:
            self.places: Places = np.memmap(directory / "places.bin", PLACE, mode="r")
        except (OSError, ValueError) as error:
            raise StorageError(
                f"can't read the planned requests in {directory}: {error}",
                hint="remove the directory `.batch` there to plan anew; the answers in it are lost then",
            ) from error

    def read(self, items: Iterable[int]) -> Iterator[Spooled]:
        """The requests of `items`, in that order. Raises StorageError."""
        for item in items:
            place = self.places[item]
            number, length = int(place["file"]), int(place["length"])
            record = self._bytes(number, int(place["offset"]), length)
            parts = record.split(b"\t", 2)
            if len(record) != length or not record.endswith(b"\n") or len(parts) != 3:
                raise StorageError(
                    f"{_data(self._directory, number)} is damaged at byte {int(place['offset'])}",
                    hint="remove the directory `.batch` there to plan anew; the answers in it are lost then",
                )
            path, name, body = parts
            yield Spooled(
                item, path.decode(), body[:-1], int(place["prompt"]), int(place["most"]),
                msgspec.json.decode(name, type=str) if name else None,
            )  # fmt: skip

    def _bytes(self, number: int, offset: int, length: int) -> bytes:
        path = _data(self._directory, number)
        try:
            if number not in self._handles:
                self._handles[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._handles[number], length, offset)
        except OSError as error:
            error.filename = str(path)
            raise disk.failed(error, "read") from error

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def _data(directory: Path, number: int) -> Path:
    return directory / f"requests-{number:05d}.data"
