"""Clients that come together and leave together, in the middle of what they asked for."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator

import msgspec

from tests.patience import DEADLINE
from tests.router.migration.field import Field

CLIENTS = 1000
ENGINES = {"aggregated": ("aggregated-0", "aggregated-1"), "two legs": ("prefill-0", "decode-0", "decode-1")}
FLAGS = ("--itl-ms", "800", "--max-num-seqs", "1024")
"""Of the engines: all clients run at once, and their answers would take 400 s."""


@contextlib.contextmanager
def files() -> Iterator[None]:
    """A thousand streams are as many sockets here, and in the engines that inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def leave(field: Field, *, stream: bool) -> float:
    """Have CLIENTS ask, and leave once all of them run. Seconds until no engine counts a request."""
    events = [asyncio.Event() for _ in range(CLIENTS)]
    tasks = [
        asyncio.create_task(_ask(field, number, stream=stream, streaming=event))
        for number, event in enumerate(events)
    ]
    async with asyncio.timeout(DEADLINE):
        if stream:
            for event in events:
                await event.wait()
        while await field.running() < CLIENTS:  # noqa: ASYNC110 - engines can only be asked
            await asyncio.sleep(0.1)
    began = time.monotonic()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await field.until_idle()
    return time.monotonic() - began


async def _ask(field: Field, number: int, *, stream: bool, streaming: asyncio.Event) -> None:
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
