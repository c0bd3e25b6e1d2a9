"""Keeps the KV blocks that outlive runs within their size, and says what the run's engines may write.

All engines of all runs write into one directory on a shared file system, and none of them knows how full it
is. So the run's first agent looks: it removes the files that nobody has used for longest, and then allows
each writer of its run a part of the room that is left (`engines/kv_files.py`, Allowance). Nothing is written
before the first look, or after this agent has died.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ...engines.kv_files import allow, free_bytes, unfinished
from ...errors import StorageError
from ...plan.offload import kv_writers, shared_bytes
from ...plan.plan import Plan
from ..console import say, warn
from ..staging.thread import in_thread
from .block_census import may_be_gone
from .kv_disk import ROOM, DiskTier, trim

EVERY = 30.0
"""Seconds between two looks."""
_REST = 5.0
"""Times as long as a look took: one client's questions about many files are a burden for all."""
_MOST_OF_FREE = 0.25
"""Part of the file system's free space that one look lets a run write: others write there, too."""
_DEAD = 3600.0
"""Age in seconds of a file that a writer did not finish; each takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTier:
    directory: str
    size: int
    """Bytes, of all runs together."""
    writers: int
    """Of this run."""
    run_dir: Path


def shared_tier(plan: Plan, rank: int, run_dir: Path) -> SharedTier | None:
    """What this agent looks after; None on all nodes but the first, and in a run without such a tier."""
    size = shared_bytes(plan)
    if rank != 0 or not size or plan.site.storage.kv is None:
        return None
    return SharedTier(directory=plan.site.storage.kv, size=size, writers=kv_writers(plan), run_dir=run_dir)


class SharedKv:
    """`run()` until cancelled."""

    def __init__(self, tier: SharedTier | None, *, every: float = EVERY) -> None:
        self._tier = tier
        self._every = every
        self._looks = 0
        self._failed = False

    async def run(self) -> None:
        while self._tier is not None:
            begun = time.monotonic()
            # The file system may hang: neither heartbeats nor the agent's end wait for it.
            await in_thread(self._look, self._tier)
            await asyncio.sleep(max(self._every, _REST * (time.monotonic() - begun)))

    def _look(self, tier: SharedTier) -> None:
        try:
            if not self._looks:
                for path in unfinished(tier.directory, _DEAD):
                    with may_be_gone():
                        os.unlink(path)
            # What is allowed now must find room as well.
            trim(DiskTier(directory=tier.directory, size=int(ROOM * tier.size)))
            room = min((1 - ROOM) * tier.size, _MOST_OF_FREE * free_bytes(tier.directory))
            # Those of an earlier attempt of the job are other looks.
            self._looks = self._looks + 1 if self._looks else time.time_ns()
            allow(tier.run_dir, self._looks, int(room / tier.writers))
        except (OSError, StorageError) as error:
            if not self._failed:
                warn(
                    f"{tier.directory} can't be looked after: no KV blocks go there until it can: {error}",
                    "can that directory of `storage.kv` be read and written on this node?",
                )
            self._failed = True
            return
        if self._failed:
            say(f"agent: {tier.directory} can be looked after again")
        self._failed = False
