"""A real router in front of real fake engines, and clients that want more than these can do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hpcserve.http.client import Pool
from hpcserve.http.errors import UpstreamError
from hpcserve.router.keys.store import KeyStore
from hpcserve.router.keys.usage_file import RunUsage, read_all
from tests.patience import DEADLINE

_WORDS = ["alpha", "bravo", "delta", "gamma", "omega", "sigma", "theta", "kappa"]


@dataclass(slots=True)
class Seen:
    """How one request ended; times are seconds since it was sent."""

    at: float
    status: int = 0
    first: float = 0.0
    """Until the answer's first byte of content, or the refusal."""
    retry_after: str = ""
    reason: str = ""


@dataclass(slots=True)
class Client:
    key: str
    seen: list[Seen] = field(default_factory=list)

    def accepted(self, start: float = 0.0, end: float = float("inf")) -> list[Seen]:
        return [one for one in self.seen if one.status == 200 and start <= one.at < end]

    def refused(self, start: float = 0.0, end: float = float("inf")) -> list[Seen]:
        return [one for one in self.seen if one.status == 429 and start <= one.at < end]


class Live:
    """Processes in a directory; `async with Live(path) as live:`."""

    def __init__(
        self,
        path: Path,
        *,
        engines: int = 1,
        prefill: float = 20_000.0,
        processes: int = 1,
        queue: float = 2.0,
    ) -> None:
        self._path = path
        self._flags = ["--prefill-tokens-per-second", f"{prefill:g}", "--itl-ms", "1"]
        self._engines = engines
        self._processes = processes
        self._queue = queue
        self._running: list[subprocess.Popen[bytes]] = []
        self._pool = Pool()
        self.keys = KeyStore(path / ".keys")
        self.url = ""
        self.router: subprocess.Popen[bytes]
        self._dice = random.Random(1)

    async def __aenter__(self) -> Live:
        urls = []
        fake = [sys.executable, "-m", "hpcserve.engines.fake_server", "--model", "toy", "--port", "0"]
        for number in range(self._engines):
            urls.append(self._start(f"engine-{number}", [*fake, *self._flags]))
        workers = [
            {"name": f"aggregated-{number}", "role": "aggregated", "url": await self._listening(log)}
            for number, log in enumerate(urls)
        ]
        config = {
            "served_name": "toy",
            "engine": "fake",
            "keys": str(self.keys.directory),
            "usage": {"directory": str(self._path / ".usage"), "run": "live", "gpus": 8},
            "queue_seconds": self._queue,
            "processes": self._processes,
            "workers": workers,
        }
        (self._path / "router.json").write_text(json.dumps(config))
        log = self._start(
            "router", [sys.executable, "-m", "hpcserve.router", "--config", str(self._path / "router.json")]
        )
        self.router = self._running[-1]
        self.url = await self._listening(log, "listening on ")
        return self

    def _start(self, name: str, argv: list[str]) -> Path:
        log = self._path / f"{name}.log"
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            self._running.append(subprocess.Popen(argv, stdout=output, stderr=output, env=environ))
        return log

    async def _listening(self, log: Path, before: str = "") -> str:
        async with asyncio.timeout(DEADLINE):
            while True:
                text = await asyncio.to_thread(log.read_text)
                found = re.search(before + r"(http://127\.0\.0\.1:\d+)", text)
                if found:
                    with contextlib.suppress(UpstreamError):
                        async with await self._pool.request("GET", f"{found[1]}/health") as answer:
                            await answer.read(1 << 20)
                            if answer.status == 200:
                                return found[1]
                await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End all processes; the router first, which writes its usage down."""
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def client(self, name: str, **fields: Any) -> Client:
        return Client(self.keys.create(name, created_by="test", **fields)[1])

    def usage(self) -> RunUsage:
        runs, warnings = read_all(self._path / ".usage")
        assert not warnings
        return runs["live"]

    def body(self, words: int, answer: int) -> bytes:
        """No two prompts share a prefix."""
        prompt = " ".join(self._dice.choice(_WORDS) for _ in range(words))
        return msgspec.json.encode(
            {"model": "toy", "prompt": prompt, "max_tokens": answer, "stream": True, "ignore_eos": True}
        )

    async def ask(self, client: Client, *, words: int = 250, answer: int = 4) -> Seen:
        """One streamed request, to its end."""
        began = time.monotonic()
        seen = Seen(began)
        headers = [
            (b"authorization", b"Bearer " + client.key.encode()),
            (b"content-type", b"application/json"),
        ]
        url = f"{self.url}/v1/completions"
        response = await self._pool.request("POST", url, headers=headers, body=self.body(words, answer))
        async with response:
            await response.next_chunk()
            seen.first = time.monotonic() - began
            seen.status = response.status
            seen.retry_after = (response.header(b"retry-after") or b"").decode()
            seen.reason = (response.header(b"x-hpcserve-reason") or b"").decode()
            await response.read(1 << 24)
        client.seen.append(seen)
        return seen

    async def insist(self, client: Client, **request: int) -> None:
        """Until cancelled: ask again and again, after a second where it was refused."""
        while True:
            seen = await self.ask(client, **request)
            if seen.status != 200:
                await asyncio.sleep(1.0)

    async def metrics(self, client: Client) -> dict[str, float]:
        headers = [(b"authorization", b"Bearer " + client.key.encode())]
        async with await self._pool.request("GET", f"{self.url}/metrics", headers=headers) as response:
            text = (await response.read(1 << 24)).decode()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def memory(self) -> float:
        """MiB of the router's processes: resident, and not shared with others."""
        total = 0
        pids = [self.router.pid]
        children = Path(f"/proc/{self.router.pid}/task/{self.router.pid}/children").read_text().split()
        for pid in [*pids, *map(int, children)]:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(kib) for kib in re.findall(r"Private_\w+:\s+(\d+)", rollup))
        return total / 1024
