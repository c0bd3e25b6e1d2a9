"""The files under logs/ of a run: whose they are, and their lines in the order of time."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .atomic import storage_error

_ROLES = ("prefill", "decode", "aggregated")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    path: Path
    label: str
    """The prefix of its lines: `head`, `agent-3`, `decode-1.n2`."""
    role: str
    """`prefill`, `decode`, `aggregated`, or the program: `job`, `head`, `router`, `agent`, `rendezvous`,
    `preflight`, `staging`."""
    rank: int | None = None
    replica: str | None = None
    node: str | None = None
    """Of an engine: the host it runs on."""


def describe(path: Path) -> LogFile:
    """What a file's name says, by the table in layout.py."""
    stem = path.name.removesuffix(".log")
    program, _, rank = stem.rpartition("-")
    if program in ("agent", "rendezvous", "preflight", "staging") and rank.isdigit():
        return LogFile(path=path, label=stem, role=program, rank=int(rank))
    replica, _, node = stem.partition(".")
    role = replica.rpartition("-")[0]
    if role in _ROLES:
        return LogFile(path=path, label=stem, role=role, replica=replica, node=node or None)
    return LogFile(path=path, label=stem, role=stem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which log files: those that fit all that is given."""

    role: str | None = None
    replica: str | None = None
    rank: int | None = None
    rank_node: str | None = None
    """The host of that rank, once it has joined."""
    rank_replicas: tuple[str, ...] = ()
    """Replicas with a process on that rank."""

    def takes(self, file: LogFile) -> bool:
        return (
            self.role in (None, file.role)
            and self.replica in (None, file.replica)
            and (self.rank is None or file.rank == self.rank or self._on_rank(file))
        )

    def _on_rank(self, file: LogFile) -> bool:
        return file.replica in self.rank_replicas and self.rank_node in (None, file.node)


def log_files(logs: Path, wanted: Wanted | None = None) -> list[LogFile]:
    """The log files that are wanted, in the order of their labels."""
    try:
        names = sorted(os.listdir(logs))
    except FileNotFoundError:
        return []
    files = [describe(logs / name) for name in names if name.endswith(".log")]
    return files if wanted is None else [file for file in files if wanted.takes(file)]


class Tail:
    """Reads what is appended to a file, whole lines only. A file that shrank or was replaced is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None
        self._rest = b""

    def lines(self) -> list[str]:
        """What is new. Raises StorageError."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                before = b""
                if status.st_ino != self._inode:
                    # Rotated: what was written before that is in the earlier part now.
                    before = self._end_of_earlier_part()
                    self._offset, self._inode = 0, status.st_ino
                elif status.st_size < self._offset:
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:  # between two halves of a rotation
            return []
        except OSError as error:
            raise storage_error(error, "read") from error
        self._offset += len(data)
        *whole, self._rest = (self._rest + before + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def _end_of_earlier_part(self) -> bytes:
        """What NAME.1 has and was not read: all of it at first, nothing if it is another file by now."""
        try:
            with self._path.with_name(f"{self._path.name}.1").open("rb") as file:
                if self._inode in (None, os.fstat(file.fileno()).st_ino):
                    file.seek(self._offset)
                    return file.read()
        except FileNotFoundError:
            pass  # replaced, not rotated
        self._rest = b""
        return b""

    def rest(self) -> list[str]:
        """A last line without its end, for a file nobody writes any more."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace")] if rest else []


# `2026-11-21 01:09:43,123`, ISO, or vLLM's `INFO 11-21 01:09:43`, which has no year.
_STAMP = re.compile(r"(?:(\d{4})-)?(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?")


def stamp(line: str, year: int) -> float | None:
    """The time at the beginning of a line, local, unix seconds; None when there is none."""
    found = _STAMP.search(line[:64])
    if found is None:
        return None
    given, *rest, fraction = found.groups()
    try:
        when = datetime(int(given or year), *map(int, rest))  # type: ignore[arg-type]
    except ValueError:
        return None
    return when.timestamp() + float(f"0.{fraction or 0}")


def interleave(files: Iterable[LogFile], year: int) -> Iterator[tuple[LogFile, str]]:
    """All lines of all files by time. A line without a time belongs to the one before it."""

    def stamped(place: int, file: LogFile) -> Iterator[tuple[float, int, int, LogFile, str]]:
        tail, last = Tail(file.path), 0.0
        for number, line in enumerate([*tail.lines(), *tail.rest()]):
            last = max(last, stamp(line, year) or last)
            yield last, place, number, file, line

    streams = [stamped(place, file) for place, file in enumerate(files)]
    for _, _, _, file, line in heapq.merge(*streams, key=lambda item: item[:3]):
        yield file, line


@dataclass(frozen=True, slots=True)
class Said:
    """An error as errors.py reports it."""

    message: str
    hint: str | None


def last_error(path: Path) -> Said | None:
    """The last `error: …` that one of hpcserve's own programs wrote; None when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_WORDS))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line]
    except OSError:  # no log, or one that may not be read: then there is no word of it
        return None
    for place in reversed(range(len(lines))):
        if lines[place].startswith("error: "):
            after = lines[place + 1] if place + 1 < len(lines) else ""
            hint = after.removeprefix("hint: ") if after.startswith("hint: ") else None
            return Said(lines[place].removeprefix("error: "), hint)
    return None


_LAST_WORDS = 65536
"""Bytes at the end of a log in which its last error is."""

_MATTERS = re.compile(
    r"error|exception|traceback|fatal|fail|killed|no space left|out of memory|denied|not found|"
    r"cannot|can't|unable|refused",
    re.IGNORECASE,
)


def lines_that_matter(logs: Path, most: int = 12) -> list[str]:
    """The last lines that sound like a failure, else simply the last ones, with their prefixes."""
    found: list[tuple[str, list[str]]] = []
    for file in log_files(logs):
        tail = Tail(file.path)
        found.append((file.label, [*tail.lines(), *tail.rest()][-200:]))
    bad = [f"{label}: {line}" for label, lines in found for line in lines if _MATTERS.search(line)]
    if bad:
        return bad[-most:]
    return [f"{label}: {line}" for label, lines in found for line in lines[-3:] if line.strip()][-most:]
