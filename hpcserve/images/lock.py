"""One process at a time, on a file system that many hosts share.

No flock: on Lustre and NFS it is often off, or holds on one host only. A lock is a directory with a file per
owner, numbered one above the last; `O_EXCL` lets one process alone have a number, and the highest number
holds the lock. Who finds that the owner is gone takes the next number, so nobody ever removes a lock that
somebody may have got meanwhile.

Alive is who renews its file's time. Times are never compared with this host's clock: a waiter looks whether
the time still changes. On the owner's own host its process says it at once.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..rundir.atomic import storage_error

HEARTBEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 120.0
"""Seconds without one after which the owner is gone. NFS shows times that are up to a minute old."""
_POLL = 0.5
_OWNER = re.compile(r"\d{6}")


@dataclass(frozen=True, slots=True)
class Owner:
    number: int
    host: str
    pid: int
    started: str | None
    """The kernel's start time of the process, which tells it from a later one with the same number."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A held lock."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number

    @property
    def token(self) -> str:
        """Names what belongs to this owner alone: numbers come again, once a lock was let go."""
        return f"{_name(self._number)}-{socket.gethostname()}-{os.getpid()}"

    def held(self) -> bool:
        """False when others took this process for dead: then it must change nothing any more."""
        return max(_numbers(self._directory), default=0) == self._number


@contextmanager
def hold(
    directory: Path,
    *,
    waiting: Callable[[Owner], None],
    silence: float = SILENCE,
    heartbeat: float = HEARTBEAT,
) -> Iterator[Lock]:
    """Wait for the lock `directory` and hold it. `waiting` is told once of each owner that is waited for.

    Raises StorageError when the directory can't be written.
    """
    try:
        number = _take(directory, waiting, silence)
    except OSError as error:
        raise storage_error(error, "lock", hint="make the directory above it writable") from error
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(directory / _name(number), over, heartbeat), daemon=True)
    beats.start()
    try:
        yield Lock(directory, number)
    finally:
        over.set()
        beats.join()
        _release(directory, number)


def _take(directory: Path, waiting: Callable[[Owner], None], silence: float) -> int:
    told: Owner | None = None
    while True:
        _make(directory)
        last = max(_numbers(directory), default=0)
        if last:
            owner = _read(directory, last)
            if owner != told:
                told = owner
                if owner is not None:
                    waiting(owner)
            if _lives(directory / _name(last), owner, silence):
                continue
        try:
            return _create(directory, last + 1)
        except FileExistsError:
            continue  # another one was quicker
        except FileNotFoundError:
            continue  # the directory was just released


def _make(directory: Path) -> None:
    """As open as the directory above: who shares that with a group takes locks over, too."""
    try:
        directory.mkdir()
    except FileExistsError:
        return
    with suppress(FileNotFoundError):  # its first owner let it go already
        directory.chmod(directory.parent.stat().st_mode & 0o777)


def _create(directory: Path, number: int) -> int:
    path = directory / _name(number)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "w") as file:
        pid = os.getpid()
        json.dump({"host": socket.gethostname(), "pid": pid, "started": _started(pid)}, file)
    return number


def _lives(path: Path, owner: Owner | None, silence: float) -> bool:
    """Watch the file until its owner gives a sign of life or goes (True: look again), or is dead (False)."""
    here = owner is not None and owner.host == socket.gethostname()
    first = _time(path)
    deadline = time.monotonic() + silence
    while time.monotonic() < deadline:
        if here and owner is not None and _started(owner.pid) != owner.started:
            return not path.exists()  # it ended: after it had let go, or before
        time.sleep(_POLL)
        now = _time(path)
        if now is None or now != first:
            return True
    return False


def _beat(path: Path, over: threading.Event, heartbeat: float) -> None:
    while not over.wait(heartbeat):
        # A server that hangs is no reason to let go: `held` decides.
        with suppress(OSError):
            os.utime(path)


def _release(directory: Path, number: int) -> None:
    """Older owners' files first, so that the highest number is never one of theirs."""
    numbers = sorted(_numbers(directory))
    if numbers and numbers[-1] != number:
        return  # another one took it over, and will tidy up
    for each in numbers:
        with suppress(FileNotFoundError):
            (directory / _name(each)).unlink()
    with suppress(OSError):  # somebody waits already
        directory.rmdir()


def _numbers(directory: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(directory) if _OWNER.fullmatch(name)]
    except FileNotFoundError:
        return []


def _name(number: int) -> str:
    return f"{number:06d}"


def _read(directory: Path, number: int) -> Owner | None:
    """None while the owner has not written its name yet, or when it died before it could."""
    try:
        found = json.loads((directory / _name(number)).read_text())
        return Owner(number, str(found["host"]), int(found["pid"]), found["started"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _started(pid: int) -> str | None:
    """None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]
