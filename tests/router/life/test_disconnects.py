"""Clients that leave: the engines' own counts of running requests show it."""

from __future__ import annotations

import msgspec
import pytest

from .crowd import ENGINES, FLAGS, files, leave


@pytest.fixture(autouse=True)
def many_files():
    with files():
        yield


@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("stream", [True, False], ids=["mid-stream", "waiting"])
async def test_thousand_clients_that_leave_leave_nothing_running(field, engines, stream):
    # How soon, is a figure of bench_disconnects.py; by themselves the engines would need 400 s.
    running = await field(*engines, flags=FLAGS)
    await leave(running, stream=stream)
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
