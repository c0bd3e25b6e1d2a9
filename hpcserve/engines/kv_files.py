"""Files of KV blocks that outlive a run, in a directory on a file system that its user's jobs share.

    KV_DIRECTORY/                  `storage.kv` of the site, mode 0700
      kv.json                      made by `hpcserve launch`; where it is missing, nothing is written
      LAYOUT/                      one for each model, layout of its KV cache and version of the engine
        layout.json                what it is for, for people
        ab/abcdef…-0.bin           one chunk of a prompt: its name is the hash of all tokens up to its end

A chunk's file is its bytes and one page that says whose they are, with their checksum. It is written under
another name and renamed, so it is there as a whole or not at all; but rename is atomic for names, not for
data: after a crash of a client of NFS or Lustre a file can have its name and not all its bytes. So a reader
believes the checksum alone, and removes what is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..rundir.atomic import storage_error, write_text

MARK = "kv.json"
SUFFIX = ".bin"
TEMPORARY = ".tmp"
ROOM = "kv-room.json"
"""In the run directory: `{"look": N, "bytes": B}`. After its Nth look at the directory, the run's first agent
lets each writer write B bytes."""
_FORMAT = 1
_PAGE = 4096
_END = struct.Struct("<8s32sQI")
_MAGIC = b"hpcsrvKV"
_READ_AGAIN = 5.0
"""Seconds between two looks of a writer at what it is allowed."""
_CHOOSE = "set `storage.kv` of the site to a directory of yours alone, on a file system that all nodes share"


class DamagedFile(OSError):
    """A file that is not what its name says."""


def make_directory(path: str) -> None:
    """Make a KV directory, or check one that exists. Raises StorageError.

    Whoever could write into it could choose what this user's models read: it must be the user's own, and
    closed to all others.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        _check_owner(path)
        mark = Path(path) / MARK
        if not mark.exists():
            write_text(mark, json.dumps({"format": _FORMAT}) + "\n", mode=0o600)
    except OSError as error:
        raise storage_error(error, "make the directory for KV blocks", hint=_CHOOSE) from error


def need_directory(path: str) -> None:
    """Raises StorageError where the KV directory that the launch made is not seen.

    It would be another one, on a disk of this node, which nobody keeps within its size.
    """
    try:
        _check_owner(path)
        os.stat(os.path.join(path, MARK))
    except OSError as error:
        raise StorageError(
            f"{path} on {os.uname().nodename} is not the directory for KV blocks that the launch made: "
            f"{error.strerror}",
            hint="`storage.kv` of the site must be on a file system that login and compute nodes share",
        ) from error


def need_room(path: str, size: int) -> None:
    """Raises StorageError where the file system has no room for `size` bytes, with those that are there."""
    free = free_bytes(path)
    if free >= size:
        return
    taken = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                taken += os.stat(os.path.join(parent, name)).st_blocks * 512
    if free + taken < size:
        gib = 1 << 30
        raise StorageError(
            f"kv_offload.shared_gib is {size / gib:g}, but {path} has room for "
            f"{(free + taken) / gib:.1f} GiB",
            hint="set it to less, free space there, or point `storage.kv` of the site elsewhere",
        )


def free_bytes(path: str) -> int:
    """What may still be written there; many file systems do not count quotas in. Raises OSError."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _check_owner(path: str) -> None:
    found = os.stat(path)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StorageError(
            f"{path} must be a directory of yours with mode 0700; user {found.st_uid} has it, with mode "
            f"{stat.S_IMODE(found.st_mode):04o}",
            hint=f"`chmod 700` it if it is yours, or {_CHOOSE}",
        )


def fingerprint(model: str, revision: str | None = None) -> str:
    """Tells a model's weights from others that were in the same place, by what the file system says of them.

    `model` is a directory, a file, or an id of the Hub whose files are in the cache here. The same for a
    staged copy, which has its files' times. Raises OSError.
    """
    if os.path.isfile(model):
        status = os.stat(model)
        return _digest([status.st_size, status.st_mtime_ns]).hex()
    found = []
    with os.scandir(model if os.path.isdir(model) else _cached(model, revision)) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_file():
                continue
            status = entry.stat()
            found.append((entry.name, status.st_size, status.st_mtime_ns))
    weights = [each for each in found if each[0].endswith(".safetensors")]
    more = [each for each in found if each[0].endswith((".json", ".py"))]
    return _digest(sorted(weights + more if weights else found)).hex()


def _cached(model: str, revision: str | None) -> str:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no id
        found = None
    if not isinstance(found, str):
        raise FileNotFoundError(
            errno.ENOENT,
            "neither a path nor in the cache of the Hugging Face hub, so KV blocks have no name",
            model,
        )
    return os.path.dirname(found)


def _digest(what: Any) -> bytes:
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).digest()


class KvFiles:
    """Chunks of one layout. Its methods may be called from several threads."""

    def __init__(self, directory: str, name: str, layout: Mapping[str, Any], size: int) -> None:
        """`layout`: all that decides what a chunk's bytes mean; `size`: bytes of a chunk. Raises OSError."""
        self._size = size
        self._layout = _digest([_FORMAT, layout, size])
        self._place = os.path.join(directory, f"{name}-{self._layout.hex()[:16]}")
        os.makedirs(self._place, mode=0o700, exist_ok=True)
        about = os.path.join(self._place, "layout.json")
        if not os.path.exists(about):
            write_text(Path(about), json.dumps(layout, indent=1, sort_keys=True) + "\n", mode=0o600)

    def path(self, key: bytes, group: int) -> str:
        name = key.hex()
        return f"{self._place}/{name[:2]}/{name}-{group}{SUFFIX}"

    def has(self, path: str) -> bool:
        """Is it there, and as long as it should be?"""
        try:
            return os.stat(path).st_size == self._size + _PAGE
        except OSError:
            return False

    def write(self, path: str, chunk: memoryview) -> int:
        """Returns the bytes written: 0 for a chunk that is there. Raises OSError, and leaves nothing then."""
        if self.has(path):
            return 0
        here = f"{path}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(here, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            descriptor = os.open(here, flags, 0o600)
        try:
            try:
                for part in (chunk, self._end(path, chunk)):
                    _write_all(descriptor, part)
            finally:
                # NFS sends what is left here, and says here that there is no room for it.
                os.close(descriptor)
            os.replace(here, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(here)
            raise
        return self._size + _PAGE

    def read(self, path: str, chunk: memoryview) -> None:
        """Fill `chunk`.

        Raises OSError: FileNotFoundError for one that is gone, DamagedFile for one that was not what it
        should be, and is gone now.
        """
        end = bytearray(_PAGE)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            whole = _read_all(descriptor, chunk) and _read_all(descriptor, memoryview(end))
        finally:
            os.close(descriptor)
        if whole and end == self._end(path, chunk):
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise DamagedFile(errno.EIO, "not what was written", path)

    def used(self, path: str) -> None:
        """The oldest files are removed first: this one is younger now."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def _end(self, path: str, chunk: memoryview) -> bytes:
        name = os.path.basename(path).encode()
        whose = hashlib.sha256(self._layout + name).digest()
        return _END.pack(_MAGIC, whose, chunk.nbytes, zlib.crc32(chunk)).ljust(_PAGE, b"\0")


def _write_all(descriptor: int, part: memoryview | bytes) -> None:
    left = memoryview(part).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def _read_all(descriptor: int, part: memoryview) -> bool:
    """False where the file ends before."""
    left = part.cast("B")
    while left:
        got = os.readv(descriptor, [left])
        if got == 0:
            return False
        left = left[got:]
    return True


class Allowance:
    """How much one writer may still write: what the agent that looks after the directory allows.

    Nothing is allowed before its first look, and nothing more once it has died: so the directory can't grow
    without somebody who removes what is oldest.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._look: int | None = None
        self._left = 0
        self._read_at = float("-inf")
        self.most = 0
        """Bytes that one look allows."""

    def take(self, size: int) -> bool:
        with self._lock:
            if self._left < size and time.monotonic() - self._read_at >= _READ_AGAIN:
                self._read_at = time.monotonic()
                self._read()
            if self._left < size:
                return False
            self._left -= size
            return True

    def stop(self) -> None:
        """The file system has no room: nothing more until the next look."""
        with self._lock:
            self._left = 0

    def _read(self) -> None:
        try:
            found = json.loads(Path(self._path).read_text())
            look, allowed = int(found["look"]), int(found["bytes"])
        except (OSError, ValueError, KeyError):
            # Not there yet; or the file system hiccups, and it is read again.
            return
        if look != self._look:
            self._look, self._left, self.most = look, allowed, allowed


def allow(run_dir: Path, look: int, size: int) -> None:
    """What each writer of a run may write until the next look. Raises StorageError."""
    write_text(run_dir / ROOM, json.dumps({"look": look, "bytes": size}) + "\n")


def unfinished(directory: str, age: float) -> Iterator[str]:
    """Files that a writer has left behind: not touched for `age` seconds, by the clock of this node."""
    before = time.time() - age
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            if name.endswith(TEMPORARY):
                with contextlib.suppress(OSError):
                    if os.stat(path).st_mtime < before:
                        yield path
