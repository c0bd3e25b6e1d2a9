"""Counts the files of KV blocks below a directory, and removes the oldest.

A tier of terabytes is a million files in as many directories: vLLM names them after a block's hash
(v1/kv_offload/file_mapper.py). To list them all takes a minute, so what a directory holds is kept until its
time says that it has changed: 32 bytes for each directory, and nothing for each file.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SECOND = 1_000_000_000
_SETTLED = 2 * SECOND
"""Two changes may have one time: a directory that changed so shortly before it was listed is listed again."""
_AGES = 1 << 16
"""The most different ages that are told apart when the oldest blocks are chosen."""
_CHANGED, _BYTES, _OLDEST, _WIDTH = 0, 1, 2, 3


class Stopped(Exception):
    """`stop()` was called meanwhile."""


@dataclass(slots=True)
class _Folder:
    """A directory with others in it."""

    known: array[int] = field(default_factory=lambda: array("q", (-1, 0, 0)))
    """When it changed last, the bytes of its own blocks, and the time of the oldest; ns."""
    leaves: list[str] = field(default_factory=list)
    sums: array[int] = field(default_factory=lambda: array("q"))
    """The same for each of `leaves`, which are directories without others in them."""
    folders: dict[str, _Folder] = field(default_factory=dict)


class Census:
    """Of one directory; in one thread at a time."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._root = _Folder()
        self._stopped = False

    def stop(self) -> None:
        """Let it end early, from another thread."""
        self._stopped = True

    def count(self) -> int:
        """Bytes of all blocks; 0 where the directory is not there yet. Raises OSError and Stopped."""
        return self._count(self._directory, self._root)

    def remove_oldest(self, keep: int) -> int:
        """Leave the `keep` bytes that were written last; the bytes removed. Raises OSError and Stopped."""
        ages, width = self._ages()
        excess, last = sum(ages.values()) - keep, None
        for age in sorted(ages):
            if excess <= 0:
                break
            excess, last = excess - ages[age], age
        if last is None:
            return 0
        # Of the last age, some may stay.
        spare, removed = -excess, 0
        for path, oldest in self._places(self._directory, self._root):
            if oldest // width > last:
                continue
            for size, written, block in self._blocks(path):
                age = written // width
                if age > last:
                    continue
                if age == last and size <= spare:
                    spare -= size
                    continue
                with may_be_gone():
                    os.unlink(block)
                    removed += size
        return removed

    def _ages(self) -> tuple[dict[int, int], int]:
        """Bytes by age, and the ns of one age."""
        ages: dict[int, int] = {}
        width = SECOND
        for path, _ in self._places(self._directory, self._root):
            for size, written, _ in self._blocks(path):
                ages[written // width] = ages.get(written // width, 0) + size
            if len(ages) > _AGES:
                width *= 2
                coarser: dict[int, int] = {}
                for age, size in ages.items():
                    coarser[age // 2] = coarser.get(age // 2, 0) + size
                ages = coarser
        return ages, width

    def _count(self, path: str, folder: _Folder) -> int:
        try:
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            return 0
        if changed != folder.known[_CHANGED]:
            self._list(path, folder, changed)
        total = folder.known[_BYTES]
        grown: list[str] = []
        for number, name in enumerate(folder.leaves):
            total += self._count_leaf(f"{path}/{name}", folder.sums, number * _WIDTH, grown)
        for name in grown:
            _move(folder, os.path.basename(name))
        for name, inner in folder.folders.items():
            total += self._count(f"{path}/{name}", inner)
        return total

    def _count_leaf(self, path: str, sums: array[int], at: int, grown: list[str]) -> int:
        if self._stopped:
            raise Stopped
        try:
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            # Its parent has changed as well.
            return 0
        if changed != sums[at + _CHANGED]:
            before = time.time_ns()
            size, oldest, inside = self._sum(path)
            if inside:
                grown.append(path)
                return 0
            sums[at + _CHANGED] = changed if changed < before - _SETTLED else -1
            sums[at + _BYTES], sums[at + _OLDEST] = size, oldest
        return sums[at + _BYTES]

    def _list(self, path: str, folder: _Folder, changed: int) -> None:
        before = time.time_ns()
        size, oldest, inside = self._sum(path)
        known = {name: number * _WIDTH for number, name in enumerate(folder.leaves)}
        sums = array("q")
        leaves = [name for name in inside if name not in folder.folders]
        for name in leaves:
            at = known.get(name)
            sums.extend((-1, 0, 0) if at is None else folder.sums[at : at + _WIDTH])
        folder.leaves, folder.sums = leaves, sums
        folder.folders = {name: inner for name, inner in folder.folders.items() if name in inside}
        folder.known = array("q", (changed if changed < before - _SETTLED else -1, size, oldest))

    def _sum(self, path: str) -> tuple[int, int, list[str]]:
        """Bytes and time of the oldest of its own blocks, and the names of directories in it."""
        total, oldest, inside = 0, sys.maxsize, []
        with may_be_gone(), os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    # One of a few names, in each of thousands of directories.
                    inside.append(sys.intern(entry.name))
                    continue
                found = _block(entry)
                if found is not None:
                    total, oldest = total + found[0], min(oldest, found[1])
        return total, oldest, inside

    def _places(self, path: str, folder: _Folder) -> Iterator[tuple[str, int]]:
        """Directories and the time of their oldest block, as the last count found them."""
        yield path, folder.known[_OLDEST]
        for number, name in enumerate(folder.leaves):
            yield f"{path}/{name}", folder.sums[number * _WIDTH + _OLDEST]
        for name, inner in folder.folders.items():
            yield from self._places(f"{path}/{name}", inner)

    def _blocks(self, path: str) -> Iterator[tuple[int, int, str]]:
        """Bytes on disk, time of the last write, and path of a directory's own blocks."""
        if self._stopped:
            raise Stopped
        with may_be_gone(), os.scandir(path) as entries:
            for entry in entries:
                found = _block(entry)
                if found is not None:
                    yield *found, entry.path


def _block(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    # Beside the blocks there are their description, and files that are being written.
    if not entry.name.endswith(".bin"):
        return None
    with may_be_gone():
        status = entry.stat(follow_symlinks=False)
        # Some file systems count no blocks of what has not reached the disk yet.
        return max(status.st_blocks * 512, status.st_size), status.st_mtime_ns
    return None


def _move(folder: _Folder, name: str) -> None:
    """A leaf has others in it now: it is a folder, which the same count lists."""
    number = folder.leaves.index(name)
    del folder.leaves[number]
    del folder.sums[number * _WIDTH : (number + 1) * _WIDTH]
    folder.folders[name] = _Folder()


@contextmanager
def may_be_gone() -> Iterator[None]:
    """Others remove files as well; NFS calls one that another client has removed stale."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
