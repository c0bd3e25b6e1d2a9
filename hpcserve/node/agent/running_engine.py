"""A started engine process, and its end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from ..process import signal_group
from ..strays import Strays
from .log_pump import LogPump
from .remains import remove_files

_GROUP_END = 5.0
"""Seconds the kernel may take to clear a killed process group."""


class RunningEngine:
    """A started engine process, its process group and its log."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        url: str | None,
        ports: Mapping[str, int],
        pump: LogPump,
        memory: tuple[Path, ...] = (),
    ) -> None:
        self.process = process
        self.url = url
        """None for a process without an API, as on most replicas' second and later nodes."""
        self.ports = ports
        self.pump = pump
        self._memory = memory
        """Files in /dev/shm that it leaves when it is killed; the next start needs their memory."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def exited(self) -> bool:
        return self.process.poll() is not None

    async def end(self, deadline: Callable[[], float]) -> int:
        """SIGTERM, and at `deadline` (loop time, may move) SIGKILL for the group. Returns the exit status."""
        clock = asyncio.get_running_loop().time
        if deadline() > clock() and not self.exited():
            # Only the first process: an engine ends its own workers in the right order.
            self.process.send_signal(signal.SIGTERM)
            await self._wait(deadline)
        last = clock() + _GROUP_END
        strays = None if self.exited() else Strays(self.pid)
        while signal_group(self.pid, signal.SIGKILL) and clock() < last:
            self.exited()
            await asyncio.sleep(0.02)
        if strays is not None:
            strays.kill()
        await self._wait(lambda: last)
        # The kernel clears hundreds of gigabytes here.
        await asyncio.to_thread(remove_files, self._memory)
        await asyncio.to_thread(self.pump.finish, 2.0)
        return self.process.returncode if self.process.returncode is not None else -signal.SIGKILL

    async def _wait(self, deadline: Callable[[], float]) -> None:
        while True:
            if self.exited() or asyncio.get_running_loop().time() >= deadline():
                return
            await asyncio.sleep(0.02)
