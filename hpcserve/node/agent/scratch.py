"""The agent's private directory on its node, the shared memory of its engines, and what of both is left when
agents are killed: with tiers of KV blocks that is terabytes of disk, and most of the node's memory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ...errors import JobError, StorageError
from ...rundir.atomic import storage_error
from ..console import say, warn
from .keeper import Keeper
from .remains import PREFIX, Remains, sweep

SHARED_MEMORY = "/dev/shm"
_STAYS = "a later run on the node can't find it: remove it by hand if the node's disk or memory gets short"


class Scratch:
    def __init__(self, node_local: str, keeper: Keeper) -> None:
        """Raises StorageError."""
        self.path = make_scratch(node_local)
        self._node_local = node_local
        self._keeper = keeper
        keeper.sweep(self.path)
        self._disk = self._written_down(node_local)
        if self._disk is not None:
            _add(self._disk, [self.path])
        self._memory: Remains | None = None
        self._memory_asked = False
        self._lock = threading.Lock()
        self._memory_free = threading.Event()
        self._memory_free.set()

    def expect(self, names: Sequence[str]) -> tuple[Path, ...]:
        """Paths of files in /dev/shm that an engine is going to make; they are removed after this agent.

        Waits for those of killed agents to be gone: call it in a thread.
        """
        files = tuple(Path(SHARED_MEMORY, name) for name in names)
        if not files:
            return files
        self._memory_free.wait()
        with self._lock:
            if not self._memory_asked:
                self._memory_asked = True
                self._memory = self._written_down(SHARED_MEMORY)
            if self._memory is not None:
                _add(self._memory, files)
        return files

    def sweep(self) -> None:
        """Begin to remove what killed agents of this user have left on this node."""
        self._memory_free.clear()
        # Not of the event loop's: the agent's end must not wait for it.
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        try:
            _sweep(SHARED_MEMORY)
        finally:
            self._memory_free.set()
        _sweep(self._node_local)

    def _written_down(self, place: str) -> Remains | None:
        try:
            remains = Remains(place, self.path.name)
        except (JobError, OSError) as error:
            warn(f"what this run leaves in {place} if it is killed can't be noted there: {error}", _STAYS)
            return None
        self._keeper.settle(remains.lock)
        return remains


def _add(remains: Remains, paths: Sequence[Path]) -> None:
    try:
        remains.add(paths)
    except OSError as error:
        warn(f"{remains.lock} can't be written: {error.strerror or error}", _STAYS)


def _sweep(place: str) -> None:
    try:
        for found in sweep(place):
            if found:
                say(f"agent: removed what a killed run has left on this node: {', '.join(map(str, found))}")
    except (JobError, OSError) as error:
        warn(f"what killed runs may have left in {place} can't be removed: {error}", _STAYS)


def make_scratch(node_local: str) -> Path:
    """A private directory on the node; short, because sockets below it have 107 bytes for their path."""
    parent = os.path.expandvars(node_local)
    if "$" in parent:
        raise StorageError(
            f"storage.node_local of the site is {node_local}, and that variable is not set on this node",
            hint="use a variable that the job has, or a plain path such as /tmp",
        )
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise storage_error(
            error,
            "make a node-local directory",
            hint="set `storage.node_local` of the site to a directory that every node has and you can write",
        ) from error
