"""A router as the head node runs it, its processes and its control line, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.patience import DEADLINE

Json = dict[str, Any]


def worker(name: str, url: str, generation: int = 0) -> Json:
    """An entry of the table; the role is what stands before the dash."""
    return {"name": name, "role": name.partition("-")[0], "url": url, "generation": generation}


class LiveRouter:
    """`await LiveRouter(folder, …).start()`; `settings` are keys of the configuration file."""

    def __init__(self, folder: Path, *, files: int | None = None, **settings: Any) -> None:
        self._config = folder / "router.json"
        defaults = {
            "host": "127.0.0.1", "port": 0, "api_key_file": None, "job_key_file": None, "engine": "fake",
            "served_name": "toy", "policy": "round_robin", "max_body": 8_000_000, "first_byte_timeout": 60,
            "retries": 1, "kv_lease": 30,
        }  # fmt: skip
        self._config.write_text(json.dumps(defaults | settings))
        self._log = folder / "router.log"
        self._files = files
        self._table: list[Json] = []
        self._told = 0
        """Tables that the router was told."""
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.stats: Json = {}
        """The last `stats` message."""
        self.suspects = 0
        self.port = 0
        self.process: subprocess.Popen[bytes]

    async def start(self) -> LiveRouter:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        limit = self._files

        def lower() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

        with theirs, self._log.open("wb") as log:
            argv = [sys.executable, "-m", "hpcserve.router", "--config", str(self._config)]
            self.process = subprocess.Popen(  # noqa: ASYNC220 - it forks, which is quick
                [*argv, "--control-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdout=log, stderr=log, preexec_fn=lower,
            )  # fmt: skip
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 24)
        self._reading = asyncio.create_task(self._read(reader))
        await self.until(lambda: self.port, "the router to listen")
        return self

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                if message["type"] == "listening":
                    self.port = message["port"]
                elif message["type"] == "stats":
                    self.stats = message
                elif message["type"] == "suspect":
                    self.suspects += 1
                self._changed.set()

    async def until(self, condition: Any, what: str, deadline: float = DEADLINE) -> None:
        """Returns when `condition()` holds; it is looked at after each message of the router."""
        try:
            async with asyncio.timeout(deadline):
                while not condition():
                    assert self.process.poll() is None, f"the router ended:\n{self.log}"
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"waited {deadline} s for {what}; {self.stats}\n{self.log[-3000:]}"
            ) from None

    async def table(self, workers: Iterable[Json]) -> None:
        """Announce these workers, and wait until the router counts them."""
        await self.tell_table(workers)
        names = {entry["name"] for entry in self._table}
        await self._taken_over()
        await self.until(lambda: set(self.stats.get("workers", ())) == names, "the workers to be counted")

    async def _taken_over(self) -> None:
        await self.until(lambda: self.stats.get("tables", 0) >= self._told, "all processes to have the table")

    async def tell_table(self, workers: Iterable[Json]) -> None:
        self._table = list(workers)
        self._told += 1
        message = {"type": "workers", "state": "ready", "reason": None, "retry_after": None, "end_time": None}
        self._writer.write(json.dumps({**message, "workers": self._table}).encode() + b"\n")
        await self._writer.drain()

    async def restarted(self) -> None:
        """Announce the same workers as new ones: what the router held against them is forgotten."""
        await self.tell_table([{**entry, "generation": entry["generation"] + 1} for entry in self._table])
        # A request that comes before is ended when it does.
        await self._taken_over()

    async def idle(self) -> None:
        """Wait until nothing is in flight, by the router's own count."""
        self.stats = {}
        await self.until(
            lambda: (
                self.stats.get("in_flight") == 0
                and not any(entry["in_flight"] for entry in self.stats["workers"].values())
            ),
            "the router to be idle",
        )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def complaints(self) -> list[str]:
        """Places in the log that only a bug writes, with what follows."""
        marks = (" ERROR ", " CRITICAL ", "Traceback", "never retrieved", "was never awaited")
        lines = self.log.splitlines()
        found = [
            at
            for at, line in enumerate(lines)
            if line.startswith("error: ") or any(mark in line for mark in marks)
        ]
        return ["\n".join(lines[at : at + 30]) for at in found[:5]]

    @property
    def pids(self) -> list[int]:
        """The process and all below it."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        pages = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open file descriptors of all its processes."""
        count = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                count += len(os.listdir(f"/proc/{pid}/fd"))
        return count

    async def stop(self) -> None:
        for pid in reversed(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait(DEADLINE)
        if self._reading is not None:
            self._reading.cancel()
        self._writer.close()
