"""A file that a writer makes: new, buffered, and on disk when it is closed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import StorageError
from ...rundir.atomic import storage_error
from ..disk import NewFile

_BUFFER = 1 << 20
_HINT = "free space there or choose another directory for the results, then give the same command again"


class OutputFile:
    """Raises StorageError throughout. An older file of this name is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = NewFile(path)
            self.file = io.BufferedWriter(self._raw, _BUFFER)
        except OSError as error:
            raise storage_error(error, "write", hint=_HINT) from error

    def write_line(self, line: bytes) -> None:
        try:
            self.file.write(line)
            self.file.write(b"\n")
        except OSError as error:
            raise self.failed(error) from error

    def close(self) -> None:
        """All of it is on disk after this; its name is the caller's to make last."""
        if self.file.closed:
            return
        try:
            self.file.flush()
            self._raw.fsync()
            self.file.close()
        except OSError as error:
            self.abandon()
            raise self.failed(error) from error

    def abandon(self) -> None:
        """Close it as it is, after an error that matters more than one here."""
        with contextlib.suppress(OSError):
            self.file.close()

    def failed(self, error: OSError) -> StorageError:
        if error.filename is None:
            error.filename = str(self.path)
        return storage_error(error, "write", hint=_HINT)


class LinesWriter:
    """The part of a writer that is the same for all files of lines."""

    def __init__(self, *paths: Path) -> None:
        self._files: list[OutputFile] = []
        try:
            for path in paths:
                self._files.append(OutputFile(path))
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _abandon(self) -> None:
        for file in self._files:
            file.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon()
