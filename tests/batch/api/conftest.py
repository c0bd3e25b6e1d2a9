"""The process of the Batch API, behind a router in this process with stub engines."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from hpcserve.router.keys.store import KeyStore
from tests.patience import DEADLINE
from tests.router.stubs import KEY, Bench, until

Json = dict[str, Any]


class Run:
    """What a run directory has of it: `await run.start("aggregated-0")`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = folder / "batches"
        self.keys = KeyStore(folder / ".keys")
        self.bench = Bench()
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[openai.AsyncOpenAI] = []
        self._log = folder / "batches.log"

    async def start(self, *engines: str, options: tuple[str, ...] = (), end_time: float | None = None) -> Run:
        await self.bench.start(*engines, batch_api=self.batches / "api.json", keys=self.keys.directory)
        self.publish(end_time)
        await self.start_process(*options)
        return self

    def publish(self, end_time: float | None) -> None:
        (self.folder / "key").write_text(KEY)
        told = {"url": f"{self.bench.url}/v1", "served_name": "toy", "key_file": str(self.folder / "key")}
        new = self.folder / "endpoint.json.new"
        new.write_text(json.dumps({**told, "end_time": end_time}))
        os.replace(new, self.folder / "endpoint.json")

    async def start_process(self, *options: str) -> None:
        (self.batches / "api.json").unlink(missing_ok=True)
        argv = [sys.executable, "-m", "hpcserve.batch", "api", str(self.batches), "--model", "org/toy"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220 - it forks, which is quick
                [*argv, "--endpoint", str(self.folder / "endpoint.json"), *options], stdout=log, stderr=log
            )
        await until((self.batches / "api.json").exists, f"the process to listen\n{self.log}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def client(self, key: str = KEY) -> openai.AsyncOpenAI:
        made = openai.AsyncOpenAI(base_url=f"{self.bench.url}/v1", api_key=key, max_retries=0, timeout=60)
        self._clients.append(made)
        return made

    async def over(self, client: openai.AsyncOpenAI, batch: str) -> Any:
        """The batch, once it has ended."""
        last: Any = None
        try:
            async with asyncio.timeout(DEADLINE):
                while last is None or last.status in (
                    "validating",
                    "in_progress",
                    "finalizing",
                    "cancelling",
                ):
                    await asyncio.sleep(0.05)
                    last = await client.batches.retrieve(batch)
        except TimeoutError:
            raise AssertionError(f"{last}\n{self.log[-3000:]}") from None
        return last

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        if self.process is not None:
            self.kill()
        await self.bench.close()


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    made = Run(tmp_path)
    yield made
    await made.close()


def lines(rows: int, *, url: str = "/v1/chat/completions", **body: Any) -> bytes:
    """An input file."""
    told = []
    for number in range(rows):
        words = f"row {number} of many"
        prompt: Json = {"prompt": words}
        if url == "/v1/chat/completions":
            prompt = {"messages": [{"role": "user", "content": words}]}
        asked = {"model": "any", **prompt, "max_tokens": 2, **body}
        told.append({"custom_id": f"r{number}", "method": "POST", "url": url, "body": asked})
    return "".join(json.dumps(line) + "\n" for line in told).encode()


async def submit(client: openai.AsyncOpenAI, data: bytes, **more: Any) -> Any:
    """A batch of this input."""
    file = await client.files.create(file=("input.jsonl", data), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
    return await client.batches.create(input_file_id=file.id, **asked)


async def content(client: openai.AsyncOpenAI, file: str | None) -> list[Json]:
    if file is None:
        return []
    text = (await client.files.content(file)).text
    return [json.loads(line) for line in text.splitlines()]
