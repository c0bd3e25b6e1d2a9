"""Carries an engine's output to its log file, without ever making the engine wait for the disk."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ...rundir.atomic import file_mode, storage_error
from ..console import warn

LOG_LIMIT = 64 << 20
"""Bytes after which a log starts anew; one earlier part is kept as NAME.1."""
_TAIL_LINES = 400
_LINE_LIMIT = 8192
_LINE_END = re.compile(rb"[\r\n]+")


class LogPump:
    """Copies an unbuffered pipe to a file, in a thread: a file system that hangs must not stop heartbeats."""

    def __init__(self, source: IO[bytes], path: Path, on_line: Callable[[str], None]) -> None:
        self._source = source
        self._path = path
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._rest = b""
        self._written = 0
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"log {path.name}", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> str:
        """Wait for the end of the output and return its last lines."""
        self._thread.join(seconds)
        return self.tail()

    def tail(self) -> str:
        return "\n".join(list(self._tail))

    def _run(self) -> None:
        file = self._open()
        with self._source:
            while data := self._source.read(65536):
                self._feed(data)
                file = self._write(file, data)
        self._feed(b"\n")
        if file is not None:
            os.close(file)

    def _feed(self, data: bytes) -> None:
        # A progress bar ends its states with a carriage return, and only the last with a line end.
        *lines, rest = _LINE_END.split(self._rest + data)
        self._rest = rest[-_LINE_LIMIT:]
        for line in lines:
            if line:
                text = line[:_LINE_LIMIT].decode("utf-8", "replace")
                self._tail.append(text)
                self._on_line(text)

    def _open(self) -> int | None:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, file_mode(self._path.parent))
            self._written = os.fstat(file).st_size
        except OSError as error:
            self._warn(error)
            return None
        return file

    def _write(self, file: int | None, data: bytes) -> int | None:
        if file is None:
            return None
        try:
            os.write(file, data)
            self._written += len(data)
            if self._written < LOG_LIMIT:
                return file
            os.rename(self._path, self._path.with_name(self._path.name + ".1"))
            os.close(file)
            return self._open()
        except OSError as error:
            self._warn(error)
            return file

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            found = storage_error(error, "write the engine's log")
            warn(f"{found.message}; the engine runs on without one", found.hint)
