"""What is left after many clients have gone: nothing."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import pytest

from hpcserve.http.compiled import compiled
from hpcserve.router.flight import Flight
from hpcserve.router.stream.generated import GeneratedStream

from .stubs import Bench, Exchange, Seen, until

AT_ONCE = 100
ROUNDS = 5


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _leave_mid_stream(bench: Bench, body: dict[str, Any]) -> None:
    response = await bench.open("/v1/completions", {**body, "stream": True})
    await response.next_chunk()
    response.abort()


async def _leave_waiting(bench: Bench, body: dict[str, Any], count: int) -> None:
    asking = [asyncio.create_task(bench.ask("/v1/completions", body)) for _ in range(count)]
    await until(lambda: bench.router.in_flight == count, "all requests to be in flight")
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("engines", [("aggregated-0",), ("prefill-0", "decode-0", "decode-1")])
async def test_a_thousand_clients_that_leave_cost_nothing_afterwards(start, engines, n):
    bench = await start(*engines)

    async def endless(exchange: Exchange, seen: Seen) -> bool:
        if (seen.body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            return False
        if not seen.body.get("stream"):
            await exchange.closed
            return True
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        while not exchange.closed.done():
            exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "a"}]}\n\n')
            await asyncio.sleep(0.01)
        return True

    for name in engines:
        bench[name].behave = endless

    async def settled() -> tuple[int, int]:
        await until(lambda: not bench.router.in_flight, "the router to be idle")
        await until(lambda: not any(stub.running for stub in bench.stubs.values()), "the engines to be idle")
        await until(lambda: not bench.server.tasks and not bench.server.connections, "the clients' end")
        # Connections to engines may be kept for later; those left over are closed by age.
        await bench.router.pool.close()
        await until(lambda: not bench.router.pool.open_connections, "the connections' end")
        bench.router.pool._closed = False
        sides = [bench.server, *(stub.server for stub in bench.stubs.values())]
        await until(lambda: not any(side.connections for side in sides if side), "the servers' ends")
        gc.collect()
        return len(asyncio.all_tasks()), _open_files()

    body = {"model": "toy", "prompt": "a b", "n": n}
    await _leave_mid_stream(bench, body)
    before = await settled()
    for _ in range(ROUNDS):
        await asyncio.gather(*(_leave_mid_stream(bench, body) for _ in range(AT_ONCE)))
        await until(lambda: not bench.router.in_flight, "the streams' end")
        await _leave_waiting(bench, body, AT_ONCE)
    tasks, files = await settled()
    assert tasks == before[0]
    # The client's own sockets close a turn of the loop later.
    await until(lambda: _open_files() <= before[1], f"{files} open files to become {before[1]}")
    assert not any(worker.in_flight or worker.leases for worker in bench.router.table.all())
    cancelled = bench.metric('hpcserve_router_cancelled_total{route="/v1/completions"}')
    assert cancelled == 1 + 2 * ROUNDS * AT_ONCE


@pytest.mark.parametrize("engines", [("aggregated-0",), ("prefill-0", "decode-0")])
async def test_what_a_stream_held_is_free_at_its_end_and_not_at_a_collection(start, engines):
    """Bodies and prompt ids of hundreds of kilobytes would pile up until the collector comes."""
    bench = await start(*engines)
    body = {"model": "toy", "prompt": "a b", "stream": True}
    express, answer = compiled("router.express", "a test"), compiled("router.stream.answer", "a test")
    assert express is not None and answer is not None
    kinds = (Flight, GeneratedStream, express.Express, answer.AnswerStream)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            response = await bench.open("/v1/completions", body)
            await response.read(1 << 20)
        await until(lambda: not bench.router.in_flight, "the router to be idle")
        # By type: isinstance() would ask other libraries' lazy modules for their class.
        left = [one for one in gc.get_objects() if type(one) in kinds]
    finally:
        gc.enable()
    assert not left
