from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from .migration.field import Field
from .stubs import Bench

Start = Callable[..., Awaitable[Bench]]
StartField = Callable[..., Awaitable[Field]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a router with stub engines: `await start("prefill-0", "decode-0", retries=1)`."""
    benches: list[Bench] = []

    async def start_one(*names: str, **settings: object) -> Bench:
        bench = Bench()
        benches.append(bench)
        return await bench.start(*names, **settings)

    yield start_one
    for bench in benches:
        await bench.close()


@pytest.fixture
async def field(tmp_path: Path) -> AsyncIterator[StartField]:
    """Starts engines and a router: `await field("prefill-0", "decode-0", "decode-1", flags=[…])`."""
    started: list[Field] = []

    async def start_one(*engines: str, **settings: Any) -> Field:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        one = Field(folder, *engines, **settings)
        started.append(one)
        return await one.start()

    yield start_one
    for one in started:
        await one.stop()
