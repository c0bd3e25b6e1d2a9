"""Runs that end, prefill workers that come back, and streams of other APIs that break."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from tests.router.conftest import start
from tests.router.stubs import Exchange, Seen, until

__all__ = ["start"]
ASK = {"model": "toy", "prompt": "a b c d", "max_tokens": 4}


async def test_work_that_can_not_finish_before_the_walltime_is_refused_with_the_reason(start):
    bench = await start("aggregated-0")
    bench.table(end_time=time.time() + 30)
    assert (await bench.ask("/v1/completions", ASK))[0] == 200
    long = {**ASK, "max_tokens": 100_000, "ignore_eos": True}
    bench.table(end_time=time.time() + 0.01)
    await asyncio.sleep(0.02)
    status, headers, data = await bench.ask("/v1/completions", long)
    assert status == 503
    assert int(headers["retry-after"]) >= 1 and headers["x-hpcserve-reason"] == "walltime"
    error = msgspec.json.decode(data)["error"]
    assert error["code"] == "walltime" and "this run ends in" in error["message"]
    bench.table(end_time=None)
    assert (await bench.ask("/v1/completions", ASK))[0] == 200


async def test_restarted_prefill_worker_gets_one_request_first(start):
    bench = await start("prefill-0", "prefill-1", "decode-0")
    spec = msgspec.structs.replace(bench["prefill-1"].spec, generation=1)
    bench.router.table.update([bench["prefill-0"].spec, spec, bench["decode-0"].spec])
    for _ in range(6):
        assert (await bench.ask("/v1/completions", ASK))[0] == 200
    assert not bench["prefill-1"].seen
    worker = bench.router.table.get("prefill-1")
    worker.breaker.probation(asyncio.get_running_loop().time() - 10)
    started = asyncio.Event()
    release = asyncio.Event()

    async def slow(exchange: Exchange, seen: Seen) -> bool:
        started.set()
        await release.wait()
        return False

    bench["prefill-1"].behave = slow
    asking: list[asyncio.Task[object]] = []
    while not started.is_set():
        asking.append(asyncio.create_task(bench.ask("/v1/completions", ASK)))
        await asyncio.sleep(0.02)
        assert len(asking) < 10
    for _ in range(6):
        assert (await bench.ask("/v1/completions", ASK))[0] == 200
    assert len(bench["prefill-1"].seen) == 1
    release.set()
    await asyncio.gather(*asking)
    bench["prefill-1"].behave = None
    for _ in range(6):
        assert (await bench.ask("/v1/completions", ASK))[0] == 200
    assert len(bench["prefill-1"].seen) > 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_stream_of_another_api_ends_with_an_error_in_its_own_form(start, path):
    bench = await start("aggregated-0", "aggregated-1")

    async def half(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b'event: x\ndata: {"type": "x", "delta": "one"}\n\n')
        await asyncio.sleep(0.05)
        exchange.abort()
        return True

    for stub in bench.stubs.values():
        stub.behave = half
    body = {"model": "toy", "input": "a", "messages": [{"role": "user", "content": "a"}], "stream": True}
    status, _, data = await bench.ask(path, {**body, "max_tokens": 5})
    assert status == 200
    *_, last = data.rstrip(b"\n").split(b"\n\n")
    name, payload = last.split(b"\n")
    assert name == b"event: error"
    error = msgspec.json.decode(payload.removeprefix(b"data: "))
    assert error["type"] == "error"
    message = error["error"]["message"] if path == "/v1/messages" else error["message"]
    assert message.startswith("aggregated-")
    await until(lambda: not bench.router.in_flight, "the end")
