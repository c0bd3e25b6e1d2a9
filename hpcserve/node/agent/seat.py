"""A replica on a node that starts nothing for it: its tasks there belong to a step that its head starts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engines.base import Failure
from ...rundir.atomic import storage_error
from .step import hold_lifeline


class Seat:
    """Holds the node's directory and the lifeline of its tasks, and says that the node is there. Asked like a
    `ReplicaProcess`."""

    ready_generation = None

    def __init__(self, *, name: str, role: str, scratch: Path, changed: Callable[[], None]) -> None:
        """Makes the directory. Raises StorageError."""
        self.name = name
        self._role = role
        self._scratch = scratch
        self._changed = changed
        self._stopping = asyncio.Event()
        self._stopped = False
        try:
            scratch.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, "make a node-local directory") from error
        self._lifeline = hold_lifeline(scratch)

    def snapshot(self) -> dict[str, Any]:
        """This node's entry in the agent's heartbeat."""
        return {
            "name": self.name,
            "role": self._role,
            "state": "stopped" if self._stopped else "loading",
            "generation": 0,
            "scratch": str(self._scratch),
        }

    def drain(self) -> None:
        """The replica's head does that."""

    def stop(self, grace: float) -> None:
        self._stopping.set()

    def restart(self, generation: int, failure: Failure) -> None:
        """The replica's head does that."""

    async def run(self) -> None:
        try:
            await self._stopping.wait()
        finally:
            os.close(self._lifeline)
        self._stopped = True
        self._changed()
