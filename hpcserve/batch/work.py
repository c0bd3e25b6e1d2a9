"""A planned batch, opened by a process that works on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import StorageError
from . import disk
from .claims import Claims, Items
from .journal import JournalWriter
from .layout import BatchDir
from .manifest import Manifest, read_manifest
from .members import Member, Members, ask_slurm
from .spool import Spool, Spooled
from .tally import Tally


class Work:
    """Everything a driver needs of a batch; `close()` gives it back."""

    def __init__(self, directory: BatchDir, me: Member) -> None:
        """Joins, and takes a journal. Raises StorageError, and RunError for a batch that is not planned."""
        self.dir = directory
        self.manifest: Manifest = read_manifest(directory)
        for path in (directory.journals, directory.claims, directory.jobs):
            make_directory(path)
        self.members = Members(directory.jobs, me, ask_slurm)
        self.members.join()
        self.members.refresh()
        self.spool = Spool(directory.plan)
        self.tally = Tally(directory.journals, self.manifest.items)
        self.tally.look()
        self.journal = JournalWriter(directory.journals)
        self.claims = Claims(directory.claims, _order(directory), me.name, self.members.alive)
        if self.claims.begun() and self.members.living() == [me.name]:
            # What dead jobs had claimed and not done comes first again, not after all else.
            self.claims.renew(self.tally.done)

    def take(self) -> Items | None:
        """The next stretch of items to do; None when all are claimed. Raises StorageError."""
        while True:
            items = self.claims.take(len(self.members.living()))
            if items is None:
                return None
            left = items[~self.tally.done[items]]
            if len(left):
                return left

    def requests(self, items: Items) -> Iterator[Spooled]:
        return self.spool.read(items.tolist())

    def close(self) -> None:
        """Raises StorageError when the journal's end did not reach the disk."""
        try:
            self.journal.close()
        finally:
            self.spool.close()
            self.members.leave()


def _order(directory: BatchDir) -> Items:
    path = directory.plan / "order.bin"
    try:
        return np.memmap(path, "<u8", mode="r")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"can't read {path}: {error}",
            hint="remove the directory `.batch` to plan anew; the answers in it are lost then",
        ) from error


def make_directory(path: Path) -> None:
    """Raises StorageError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise disk.failed(error, "make") from error
