"""What the supervisor reads of engines that make whoever reads wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from hpcserve.router import watch
from hpcserve.router.config import RouterConfig, WorkerSpec
from hpcserve.router.watch import Watch
from tests.patience import DEADLINE

BATCH = {"numContextRequests": 0, "numGenRequests": 2, "numCtxTokens": 0}
ITERATIONS = [{"iterLatencyMS": 10.0, "numActiveRequests": 2, "inflightBatchingStats": BATCH}]


async def test_an_engine_that_waits_is_asked_while_it_has_requests_and_never_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_EVERY", 0.02)
    monkeypatch.setattr(watch, "_PATIENCE", 0.05)  # less than this engine takes
    asked, told, busy = [], asyncio.Queue[Mapping[str, Any]](), {"one": False}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(0.2)
        body = json.dumps(ITERATIONS).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    spec = WorkerSpec(name="one", role="aggregated", url=url)
    looking = Watch(RouterConfig(served_name="m", engine="tensorrt-llm"))
    reading = asyncio.create_task(looking.facts(lambda: (spec,), lambda name: busy[name], told.put_nowait))
    try:
        async with asyncio.timeout(DEADLINE):
            await asyncio.sleep(0.2)
            assert asked == [] and told.empty()
            busy["one"] = True
            facts = await told.get()
            assert facts["one"]["running"] == 2.0 and len(asked) >= 1
            busy["one"] = False
            while facts["one"]["running"]:
                facts = await told.get()
            before = len(asked)
            await asyncio.sleep(0.2)
            assert len(asked) == before
    finally:
        reading.cancel()
        await looking.close()
        server.close()
