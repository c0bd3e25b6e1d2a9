"""Keeps the KV blocks that engines put on the node's disk within their size.

vLLM's file tier (0.32, v1/kv_offload/tiering/fs) writes one file per block and removes none. It looks for
a file when a prompt asks for the block, and computes what it can't read, so the oldest can go at any time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

EVERY = 5.0
"""Seconds between two looks."""
_REST = 20.0
"""Times as long as a look took: with a million files that is more than EVERY."""
ROOM = 0.9
"""Part of the size that is left after a look which found more; the rest may be full before the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTier:
    """A directory of blocks, and the bytes it may take."""

    directory: str
    size: int


class KvDisk:
    """`run()` until cancelled."""

    def __init__(self, tiers: Sequence[DiskTier], *, every: float = EVERY) -> None:
        self._tiers = tiers
        self._every = every

    async def run(self) -> None:
        while self._tiers:
            begun = time.monotonic()
            for tier in self._tiers:
                # In a thread: a full or slow disk must not stop the heartbeats.
                await asyncio.to_thread(trim, tier)
            await asyncio.sleep(max(self._every, _REST * (time.monotonic() - begun)))


def trim(tier: DiskTier) -> int:
    """Remove the files that were written longest ago where there are too many. Returns the bytes removed."""
    files = sorted(_files(tier.directory))
    left = sum(size for _, size, _ in files)
    removed = 0
    if left <= tier.size:
        return removed
    for _, size, path in files:
        if left <= ROOM * tier.size:
            break
        with may_be_gone():
            os.unlink(path)
            removed += size
        left -= size
    return removed


@contextmanager
def may_be_gone() -> Iterator[None]:
    """Others remove files as well; NFS calls one that another client has removed stale."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def _files(directory: str) -> Iterator[tuple[int, int, str]]:
    """Time of the last write, bytes on disk and path of each block."""
    for parent, _, names in os.walk(directory):
        for name in names:
            # Beside the blocks there are their description, and files that are being written.
            if not name.endswith(".bin"):
                continue
            path = os.path.join(parent, name)
            with may_be_gone():
                found = os.stat(path)
                # Lustre counts no blocks of what a client has not sent yet.
                yield found.st_mtime_ns, max(found.st_blocks * 512, found.st_size), path
