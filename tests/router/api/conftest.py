from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ..live import LiveRouter, worker
from ..stubs import JOB_KEY, KEY
from .engine import ApiEngine


class Endpoint:
    """The router's processes before stub engines: `await endpoint.start(ApiEngine("aggregated-0"))`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.engines: list[ApiEngine] = []
        self.router: LiveRouter

    async def start(self, *engines: ApiEngine, **settings: Any) -> Endpoint:
        for name, key in (("api", KEY), ("job", JOB_KEY)):
            (self._folder / f"{name}.key").write_text(key)
        for engine in engines:
            self.engines.append(engine)
            await engine.start()
        keys = {
            "api_key_file": str(self._folder / "api.key"),
            "job_key_file": str(self._folder / "job.key"),
        }
        self.router = await LiveRouter(self._folder, engine="vllm", **(keys | settings)).start()
        await self.router.table([worker(engine.name, engine.spec.url) for engine in engines])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    async def stop(self) -> None:
        await self.router.stop()
        for engine in self.engines:
            await engine.stop()
        # The stubs' connections are closed in the loop's next turn.
        await asyncio.sleep(0)


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(tmp_path)
    yield endpoint
    await endpoint.stop()
