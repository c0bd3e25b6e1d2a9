"""What an agent leaves on its node when it is killed, written down so that somebody removes it.

    PLACE/hpcserve-UID/locks/hs-XXXXXXXX
        flock     shared while the agent lives, or its keeper
        text      the node's name, and one path a line: directories and files of this user

It is the directory of staged models (`staging/store.py`): nothing in it is believed when it may be anybody
else's.
Who finds a lock that nobody holds removes what it names, and then the lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..console import warn
from ..staging.store import Store, own_file

PREFIX = "hs-"


class Remains:
    """Held until this process ends."""

    def __init__(self, place: str, name: str) -> None:
        """`name` begins with PREFIX, and is nobody else's. Raises NotStaged and OSError."""
        self.lock = Store(place).locks / name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.lock, flags, 0o600)
        try:
            # Nobody takes it before it has its text.
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._write(_node())
        except OSError:
            self.lock.unlink()
            os.close(self._file)
            raise

    def add(self, paths: Iterable[Path]) -> None:
        """Call it before they are made. Raises OSError."""
        for path in paths:
            self._write(str(path))

    def _write(self, line: str) -> None:
        text = f"{line}\n".encode()
        if os.write(self._file, text) != len(text):
            raise OSError(f"{self.lock} was cut")


def hold(lock: Path) -> None:
    """As its agent does, until this process ends. Raises OSError."""
    file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def settle(lock: Path) -> list[Path]:
    """Remove what it names, and then the lock. Returns what there was. Raises OSError."""
    named = _named(lock) or []
    found = [path for path in named if os.path.lexists(path)]
    remove_files(found)
    for path in found:
        if _own_directory(path):
            # What can't be removed now is left to the next one.
            shutil.rmtree(path, ignore_errors=True)
    if not any(_own_directory(path) for path in found):
        lock.unlink(missing_ok=True)
    return found


def sweep(place: str) -> Iterator[list[Path]]:
    """Settle the locks of this node that nobody holds: of each, what there was. Raises NotStaged, OSError."""
    if not os.path.lexists(os.path.join(os.path.expandvars(place), f"hpcserve-{os.getuid()}")):
        return
    for lock in sorted(Store(place).locks.glob(f"{PREFIX}*")):
        if _named(lock) is not None:
            with _taken(lock) as ours:
                if ours:
                    yield settle(lock)


def remove_files(paths: Iterable[Path]) -> None:
    """Those that are there, and files of this user."""
    for path in paths:
        try:
            if own_file(path) is not None:
                os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            warn(f"{path} can't be removed: {error.strerror}", "look at it on this node")


def _named(lock: Path) -> list[Path] | None:
    """None for a lock of another node, and one that is gone or has no text yet. Raises OSError."""
    try:
        lines = lock.read_text().splitlines()
    except FileNotFoundError:
        return None
    return [Path(line) for line in lines[1:]] if lines[:1] == [_node()] else None


@contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    """Keep off who would remove the same. False: somebody holds it, or it is gone."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except BlockingIOError:
        ours = False
    try:
        yield ours
    finally:
        os.close(file)


def _own_directory(path: Path) -> bool:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _node() -> str:
    """On a file system that nodes share, flock may know of the own node's processes only."""
    return os.uname().nodename
