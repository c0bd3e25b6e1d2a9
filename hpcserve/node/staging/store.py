"""The directory of one user's staged models on one node.

    NODE_LOCAL/hpcserve-UID/            0700; nothing in it is believed when it is anybody else's
        locks/ID                        flock: exclusive to stage or remove ID, shared to use it
        ID/manifest.json                what the copy holds, and each file's size and times here
        ID/NAME/                        the whole copy; NAME is the last part of the model's path
        ID/partial/                     a copy in the making; a file with its own name is whole

ID is the listing's fingerprint. flock ends with its process, so a killed job leaves no lock behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .trouble import NotStaged

RECENT = 600.0
"""Seconds in which a copy is not removed for another: the engines of the job that staged it are to come."""
IN_MEMORY = ("tmpfs", "ramfs")
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs", "panfs", "cifs", "smb3")
"""Types of file systems on which all nodes would write one copy."""
_ON_DISK = "set `storage.node_local` of the site to a directory of yours on each node's own disk"


class Store:
    """`NODE_LOCAL/hpcserve-UID`, checked. Raises NotStaged when it can't be trusted or made."""

    def __init__(self, node_local: str) -> None:
        parent = expand(node_local)
        self.root = parent / f"hpcserve-{os.getuid()}"
        self.locks = self.root / "locks"
        try:
            _check_parent(parent)
            _private(self.root)
            _private(self.locks)
        except OSError as error:
            raise NotStaged(
                f"{self.root} can't be used: {error.strerror or error}",
                hint=_ON_DISK,
            ) from error

    @property
    def identity(self) -> str:
        """The same for two ranks that see one directory on one machine."""
        status = os.stat(self.root)
        return f"{status.st_dev}:{status.st_ino}"

    def file_system(self) -> str:
        """Its type, as mount(8) shows it; "" where /proc does not say."""
        device = os.stat(self.root).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0]
        return ""

    def free(self) -> int:
        """Bytes this user may still write, as far as the file system says."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def old_copies(self, keep: str) -> list[tuple[str, int]]:
        """IDs and bytes of copies that nobody uses, the one unused for longest first; not `keep`."""
        found = []
        for name in sorted(os.listdir(self.root)):
            path = self.root / name
            if name in ("locks", keep) or path.is_symlink() or not path.is_dir():
                continue
            lock = Lock(self.locks / name)
            if time.time() - lock.used() > RECENT and lock.exclusive():
                found.append((lock.used(), name, _bytes_below(path)))
            lock.close()
        return [(ident, size) for _, ident, size in sorted(found)]

    def make_room(self, needed: int, keep: str) -> list[str]:
        """Remove old copies until `needed` bytes are free, or none is left; the IDs of those removed."""
        removed = []
        for ident, _ in self.old_copies(keep):
            if self.free() >= needed:
                break
            lock = Lock(self.locks / ident)
            if lock.exclusive():
                remove(self.root / ident)
                removed.append(ident)
            lock.close()
        return removed


def expand(node_local: str) -> Path:
    """With this node's variables. Raises NotStaged for one that is not set."""
    text = os.path.expandvars(node_local)
    if "$" in text:
        raise NotStaged(
            f"storage.node_local of the site is {node_local}, and that variable is not set on this node",
            hint="use a variable that the job has, or a plain path",
        )
    return Path(text)


class Lock:
    """One copy's lock file. Files in locks/ are never removed: who waits for one must find the same again."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def shared(self) -> bool:
        return self._take(fcntl.LOCK_SH)

    def exclusive(self) -> bool:
        """Also from shared; then it was neither for a moment: look again at what was seen."""
        return self._take(fcntl.LOCK_EX)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def touch(self) -> None:
        """The copy is used now."""
        os.utime(self._file, ns=(os.fstat(self._file).st_atime_ns, time.time_ns()))

    def promise(self) -> None:
        """The copy is used now, and a job whose engines are to come counts on it."""
        os.utime(self._file)

    def used(self) -> float:
        """Unix seconds."""
        return os.fstat(self._file).st_mtime

    def promised(self) -> float:
        """Unix seconds: the last `promise`. It is the file's atime, for nobody reads an empty file."""
        return os.fstat(self._file).st_atime

    def close(self) -> None:
        os.close(self._file)


def remove(directory: Path) -> None:
    """Remove one copy, its manifest first: half a copy must not look like a whole one."""
    (directory / "manifest.json").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)


def own_file(path: Path) -> os.stat_result | None:
    """Status of a plain file of ours; None for a link, another's file, or none."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() else None


def _check_parent(parent: Path) -> None:
    status = os.stat(parent)
    others = status.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
    if others and not status.st_mode & stat.S_ISVTX and status.st_uid != os.getuid():
        raise NotStaged(
            f"others may rename what lies in {parent}: it is writable for them and not sticky",
            hint=_ON_DISK,
        )


def _private(path: Path) -> None:
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NotStaged(
            f"{path} is not a directory that only you can use, so what lies there is not trusted",
            hint=f"look at it (`ls -ld {path}`): remove it if it is yours; if it is another user's,"
            " tell your administrators and choose another `storage.node_local`",
        )


def _bytes_below(directory: Path) -> int:
    return sum(status.st_size for _, status in files_below(directory))


def files_below(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names below a directory, with slashes, and their status; links are not followed."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            with suppress(FileNotFoundError):
                yield path.relative_to(directory).as_posix(), path.lstat()


def memory_for_files(environ: Mapping[str, str]) -> int:
    """Bytes of memory that a model in a tmpfs may take: half of what is free, and of the job's share."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    asked = environ.get("SLURM_MEM_PER_NODE", "")
    if asked.isdecimal() and int(asked) > 0:
        available = min(available, int(asked) << 20)
    return available // 2
