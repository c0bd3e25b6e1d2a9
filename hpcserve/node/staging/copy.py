"""One model's copy on one node: whose turn it is, what of it is there, and the step that makes it whole."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from ...errors import JobError, StorageError
from ...rundir.atomic import read_json, write_json
from ..console import warn
from .source import Listing
from .store import RECENT, Lock, Store, files_below, own_file, remove
from .trouble import NotStaged

VERSION = 1
PART = ".hpcserve-part"
"""End of the name of a file that is not whole."""

Claim = Literal["complete", "ours", "staging", "in use"]
"""`complete`: read it. `ours`: write it. `staging`: another job of the user writes it. `in use`: it is
not whole, and yet read."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a whole copy, as lstat(2) shows it on this node."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    source: str
    fingerprint: str
    files: list[_Entry]


class Copy:
    """Holds the copy's lock from `claim` until `close`."""

    def __init__(self, store: Store, listing: Listing) -> None:
        self.store = store
        self.listing = listing
        self.directory = store.root / listing.fingerprint
        self.path = self.directory / listing.name
        self.partial = self.directory / "partial"
        self._manifest = self.directory / "manifest.json"
        self.whole = False
        """`path` is there; else its files are in `partial`."""
        self._lock = Lock(store.locks / listing.fingerprint)

    def claim(self) -> Claim:
        """Does not wait. Raises OSError."""
        if not self._lock.shared():
            return "staging"
        self._lock.promise()
        self.whole = self._complete()
        if self.whole:
            return "complete"
        if not self._lock.exclusive():
            return "in use"
        # Between the two locks another job may have made it whole.
        self.whole = self._complete()
        return "complete" if self.whole else "ours"

    def _complete(self) -> bool:
        entries = self._entries()
        names = [file.name for file in self.listing.files]
        if entries is None or sorted(entries) != sorted(names):
            return False
        sizes = all(entries[file.name].size == file.size for file in self.listing.files)
        return sizes and all(_unchanged(self.path / name, entry) for name, entry in entries.items())

    def _entries(self) -> dict[str, _Entry] | None:
        if own_file(self._manifest) is None:
            return None
        try:
            manifest = msgspec.convert(read_json(self._manifest), _Manifest)
        except (FileNotFoundError, StorageError, msgspec.ValidationError):
            return None  # cut by a full disk, or another version's: the copy is made again
        if (manifest.version, manifest.fingerprint) != (VERSION, self.listing.fingerprint):
            return None
        return {entry.name: entry for entry in manifest.files}

    def prepare(self) -> frozenset[int]:
        """With the lock: make partial/ and clear it of what is not whole. Indices of the files that are.

        What is left of a copy that was whole, and then changed, is used as well. Raises OSError.
        """
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if os.path.lexists(self.path):
            self._reopen()
        self._manifest.unlink(missing_ok=True)
        self.partial.mkdir(mode=0o700, exist_ok=True)
        wanted = {file.name: index for index, file in enumerate(self.listing.files)}
        held = set()
        for name, _ in list(files_below(self.partial)):
            index = wanted.get(name)
            status = own_file(self.partial / name)
            if index is not None and status is not None:
                file = self.listing.files[index]
                if (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns):
                    held.add(index)
                    continue
            (self.partial / name).unlink()
        return frozenset(held)

    def _reopen(self) -> None:
        """A whole copy is damaged: keep those of its files that its manifest still describes."""
        entries = self._entries() or {}
        if self.path.is_symlink() or not entries or os.path.lexists(self.partial):
            remove(self.directory)
            self.directory.mkdir(mode=0o700)
            return
        for name, _ in list(files_below(self.path)):
            if name not in entries or not _unchanged(self.path / name, entries[name]):
                (self.path / name).unlink()
        self.path.rename(self.partial)

    def open_held(self, index: int) -> int:
        """A descriptor for reading a file that is whole. Raises OSError."""
        path = (self.path if self.whole else self.partial) / self.listing.files[index].name
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def part(self, index: int) -> Path:
        """Where file `index` is written."""
        return self.partial / (self.listing.files[index].name + PART)

    def create(self, index: int) -> int:
        """A descriptor for reading and writing the file in the making. Raises OSError."""
        path = self.part(index)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600)

    def finish(self, index: int, descriptor: int) -> None:
        """All bytes of a file are there: to the disk with them, then its own name. Raises OSError."""
        file = self.listing.files[index]
        os.fsync(descriptor)
        os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
        self.part(index).rename(self.partial / file.name)

    def commit(self) -> None:
        """All files are there: manifest, then the directory's own name; others may read it from now on.

        Raises NotStaged or OSError.
        """
        entries = []
        for file in self.listing.files:
            status = own_file(self.partial / file.name)
            if status is None or status.st_size != file.size:
                raise NotStaged(f"{self.partial / file.name} vanished, or changed, while it was staged")
            entries.append(
                _Entry(
                    name=file.name,
                    size=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                    ctime_ns=status.st_ctime_ns,
                )
            )
        for parent, _, _ in os.walk(self.partial):
            _sync(Path(parent))
        manifest = _Manifest(
            version=VERSION,
            source=self.listing.path,
            fingerprint=self.listing.fingerprint,
            files=entries,
        )
        try:
            write_json(self._manifest, msgspec.to_builtins(manifest), mode=0o600)
        except StorageError as error:
            raise NotStaged(error.message, hint="free space on that disk of the node") from error
        self.partial.rename(self.path)
        _sync(self.directory)
        self.whole = True
        self._lock.promise()
        self._lock.shared()

    def discard(self) -> None:
        """With the lock: remove what is there, as far as that goes."""
        with suppress(OSError):
            remove(self.directory)

    def close(self) -> None:
        self._lock.close()


class Lease:
    """Keeps a copy from being removed while engines use it. Raises JobError when it is gone."""

    def __init__(self, path: str) -> None:
        self._directory = Path(path).parent
        try:
            self._lock = Lock(self._directory.parent / "locks" / self._directory.name)
        except OSError as error:
            raise _gone(path) from error
        if not self._lock.shared() or own_file(self._directory / "manifest.json") is None:
            self._lock.close()
            raise _gone(path)
        self._lock.touch()
        self._promised = self._lock.promised()

    def end(self, *, keep: bool) -> None:
        """Nobody here uses it any more.

        Without `keep` it is removed, unless another job uses it, or staged it just now and will.
        """
        try:
            if not keep and self._lock.exclusive() and not self._awaited():
                remove(self._directory)
            else:
                self._lock.touch()
        except OSError as error:
            warn(f"the copy of the model in {self._directory} stays: {error.strerror or error}")
        finally:
            self._lock.close()

    def _awaited(self) -> bool:
        promised = self._lock.promised()
        return promised > self._promised and time.time() - promised < RECENT


def _gone(path: str) -> JobError:
    return JobError(
        f"the copy of the model at {path} on this node is gone",
        hint="was it removed just now, by hand or by a cleaner of that directory? Launch again",
    )


def _unchanged(path: Path, entry: _Entry) -> bool:
    status = own_file(path)
    return status is not None and (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
        entry.size,
        entry.mtime_ns,
        entry.ctime_ns,
    )


def _sync(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
