"""Keeps the KV blocks that engines put on the node's disk within their size.

vLLM's file tier (0.32, v1/kv_offload/tiering/fs) writes one file per block and removes none. It looks for
a file when a prompt asks for the block, and computes what it can't read, so the oldest can go at any time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from .block_census import Census, Stopped

EVERY = 5.0
"""Seconds between two looks, where they are short."""
_REST = 4.0
"""Times as long as a look took: others need the disk, and the agent its time."""
MOST_REST = 30.0
"""Seconds: while nobody looks, engines write."""
ROOM = 0.9
"""Part of the size that is left when the oldest blocks are removed: to choose them, all are looked at."""
_LEAST = 0.5
"""Part of the size that is left however fast engines write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTier:
    """A directory of blocks, and the bytes it may take."""

    directory: str
    size: int


class KvDisk:
    """`run()` until cancelled."""

    def __init__(self, tiers: Sequence[DiskTier], *, every: float = EVERY) -> None:
        self._looks = [Look(tier) for tier in tiers]
        self._every = every

    async def run(self) -> None:
        try:
            while self._looks:
                begun = time.monotonic()
                for look in self._looks:
                    # In a thread: a full or slow disk must not stop the heartbeats.
                    await asyncio.to_thread(look.again)
                await asyncio.sleep(rest(time.monotonic() - begun, self._every))
        finally:
            # The threads would keep the agent from ending.
            for look in self._looks:
                look.stop()


def rest(took: float, every: float) -> float:
    """Seconds until the next look, after one that took so long."""
    return max(every, min(MOST_REST, _REST * took))


class Look:
    """At one tier, again and again."""

    def __init__(self, tier: DiskTier) -> None:
        self._size = tier.size
        self._census = Census(tier.directory)
        self._left: int | None = None
        """Bytes after the last look."""
        self._ended = 0.0
        """When that was (monotonic)."""
        self._choosing = 0.0
        """Seconds that removing blocks took last; meanwhile engines write on."""

    def stop(self) -> None:
        self._census.stop()

    def again(self) -> int:
        """Remove the blocks that were written longest ago where there are too many, or would be before the
        next look. Returns the bytes removed. Raises OSError."""
        removed = 0
        with suppress(Stopped):
            found = self._census.count()
            ahead = self._ahead(found)
            if found + ahead > self._size:
                begun = time.monotonic()
                keep = min(ROOM * self._size, self._size - 2 * ahead)
                removed = self._census.remove_oldest(int(max(_LEAST * self._size, keep)))
                self._choosing = time.monotonic() - begun
            self._left, self._ended = found - removed, time.monotonic()
        return removed

    def _ahead(self, found: int) -> float:
        """Bytes that come until the next look has removed some, if it goes on as since the last one."""
        if self._left is None:
            return 0.0
        since = max(time.monotonic() - self._ended, 1e-3)
        return max(0, found - self._left) * (1 + self._choosing / since)


def trim(tier: DiskTier) -> int:
    """One look. Raises OSError."""
    return Look(tier).again()
