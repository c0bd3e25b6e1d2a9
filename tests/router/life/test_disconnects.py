"""Clients that leave: the engines' own counts of running requests show it within a second."""

from __future__ import annotations

import asyncio
import resource

import msgspec
import pytest

from tests.patience import DEADLINE
from tests.router.migration.field import Field

CLIENTS = 1000
ENGINES = [("aggregated-0", "aggregated-1"), ("prefill-0", "decode-0", "decode-1")]


@pytest.fixture(autouse=True)
def files():
    """A thousand streams are as many sockets here, and in the engines that inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _open(field: Field, number: int, *, stream: bool, streaming: asyncio.Event) -> None:
    body = {
        "model": "toy", "max_tokens": 500, "stream": stream, "n": 1,
        "messages": [{"role": "user", "content": f"number {number}"}],
    }  # fmt: skip
    response = await field.pool.request(
        "POST", field.base + "/v1/chat/completions", body=msgspec.json.encode(body)
    )
    async with response:
        await response.next_chunk()
        streaming.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("engines", ENGINES, ids=["aggregated", "two legs"])
@pytest.mark.parametrize("stream", [True, False], ids=["mid-stream", "waiting"])
async def test_thousand_clients_that_leave_leave_nothing_running(field, engines, stream):
    running = await field(*engines, flags=["--itl-ms", "800", "--max-num-seqs", "1024"])
    events = [asyncio.Event() for _ in range(CLIENTS)]
    tasks = [
        asyncio.create_task(_open(running, i, stream=stream, streaming=event))
        for i, event in enumerate(events)
    ]
    async with asyncio.timeout(DEADLINE):
        if stream:
            for event in events:
                await event.wait()
        while await running.running() < CLIENTS:  # noqa: ASYNC110 - engines can only be asked
            await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await running.until_idle()
    await running.router.idle()


async def test_choices_of_a_client_that_leaves_all_end(field):
    running = await field("prefill-0", "decode-0", flags=["--itl-ms", "1000"])
    body = {"model": "toy", "max_tokens": 500, "stream": True, "n": 16, "prompt": "several at once"}
    response = await running.pool.request(
        "POST", running.base + "/v1/completions", body=msgspec.json.encode(body)
    )
    async with response:
        await response.next_chunk()
    await running.until_idle()
