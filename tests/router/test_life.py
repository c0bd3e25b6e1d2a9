"""Workers that fail, leave and come back; slow clients; draining."""

from __future__ import annotations

import asyncio
import tracemalloc

import msgspec
import pytest

from hpcserve.http.errors import UpstreamError
from tests.patience import DEADLINE

from .stubs import Exchange, Seen, answer_with, drop, hang, sse, until

ASK = {"model": "toy", "prompt": "a b c d", "max_tokens": 4}
STREAM = {**ASK, "stream": True}


@pytest.mark.parametrize("behave", [answer_with(502), answer_with(503), answer_with(504), drop, hang])
async def test_worker_that_fails_before_its_first_byte_is_replaced(start, behave):
    bench = await start("aggregated-0", "aggregated-1", first_byte_timeout=0.3)
    bench["aggregated-1"].behave = behave
    for body in (STREAM, ASK):
        assert (await bench.ask("/v1/completions", body))[0] == 200
    # The failed one is avoided for a moment, so only one request met it.
    assert bench.metric('hpcserve_router_retries_total{leg="single"}') == 1
    assert [name for name, _ in bench.suspects] == ["aggregated-1"]


async def test_answer_that_is_not_streamed_may_take_any_time(start):
    bench = await start("prefill-0", "decode-0", "aggregated-0", first_byte_timeout=0.1)

    async def long(exchange: Exchange, seen: Seen) -> bool:
        if not (seen.body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            await asyncio.sleep(0.4)
        return False

    for engines in (("prefill-0", "decode-0"), ("aggregated-0",)):
        bench.table(*(set(bench.stubs) - set(engines)))
        bench[engines[-1]].behave = long
        assert (await bench.json("/v1/completions", ASK))["choices"]
        assert (await bench.json("/v1/completions", {**ASK, "n": 2}))["choices"]
        status, error = await bench.error("/v1/completions", STREAM)
        assert (status, error["code"]) == (504, "worker_timeout")


@pytest.mark.parametrize("leg", ["aggregated-0", "prefill-0", "decode-0"])
async def test_engine_that_does_not_know_the_key_is_reported_and_replaced(start, leg, caplog):
    others = {"aggregated-0": (), "prefill-0": ("decode-0",), "decode-0": ("prefill-0",)}[leg]
    twin = leg.replace("0", "1")
    bench = await start(leg, twin, *others)
    bench[twin].behave = answer_with(401)
    for _ in range(2):
        assert (await bench.json("/v1/completions", ASK))["choices"]
    assert bench.suspects == [(twin, f"{twin}: the engine answered 401: it does not take this run's job key")]
    assert "job key" in caplog.text
    assert bench.metric('hpcserve_router_errors_total{reason="status"}') == 1


async def test_engines_words_are_in_the_error_when_no_other_could_do_it(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = answer_with(503, "the queue is full")
    status, error = await bench.error("/v1/completions", ASK)
    assert status == 502
    assert error["message"] == "aggregated-0: the engine answered 503: the queue is full"


@pytest.mark.parametrize("n", [1, 2])
async def test_error_event_of_an_engine_reaches_the_client_and_is_counted(start, n):
    bench = await start("prefill-0", "decode-0")

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "{\\"error\\""}]}\n\n')
        await asyncio.sleep(0.05)
        exchange.write(b'data: {"error": {"message": "KV is lost", "code": 500}}\n\ndata: [DONE]\n\n')
        exchange.finish()
        return True

    bench["decode-0"].behave = behave
    status, _, data = await bench.ask("/v1/completions", {**STREAM, "n": n})
    assert status == 200
    errors = [event["error"]["message"] for event in sse(data) if "error" in event and event != "[DONE]"]
    assert errors == ["KV is lost"]
    assert bench.metric('hpcserve_router_errors_total{reason="stream_error"}') == 1
    assert bench.metric("hpcserve_router_broken_streams_total") == 1


async def test_stream_head_without_an_event_is_no_first_byte(start):
    bench = await start("aggregated-0", "aggregated-1")

    async def head_only(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        await asyncio.sleep(0.05)
        exchange.abort()
        return True

    bench["aggregated-1"].behave = head_only
    for _ in range(2):
        status, _, data = await bench.ask("/v1/completions", STREAM)
        assert status == 200 and sse(data)[-1] == "[DONE]"


async def test_whole_answer_that_breaks_off_is_tried_again(start):
    bench = await start("aggregated-0", "aggregated-1")

    async def half(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"application/json")], length=100)
        exchange.write(b'{"a"')
        await asyncio.sleep(0.05)
        exchange.abort()
        return True

    bench["aggregated-1"].behave = half
    for _ in range(2):
        assert (await bench.json("/v1/completions", ASK))["choices"]


async def test_retries_are_bounded_and_the_error_says_why(start):
    bench = await start(*(f"aggregated-{i}" for i in range(6)), retries=2)
    for stub in bench.stubs.values():
        stub.behave = drop
    status, error = await bench.error("/v1/completions", ASK)
    assert (status, error["code"]) == (502, "worker_reset")
    assert sum(len(stub.seen) for stub in bench.stubs.values()) <= 3


async def _two_events_then(exchange: Exchange, end) -> bool:  # type: ignore[no-untyped-def]
    exchange.start(200, [(b"content-type", b"text/event-stream")])
    exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "one"}]}\n\n')
    exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "two"}]}\n\ndata: {"id": "x", "cho')
    await end(exchange)
    return True


@pytest.mark.parametrize(
    "engines, n",
    [(("aggregated-0",), 1), (("prefill-0", "decode-0"), 1), (("prefill-0", "decode-0"), 2)],
    ids=["one leg", "two legs", "two legs, two choices"],
)
@pytest.mark.parametrize("how", ["dies", "leaves the table", "is restarted"])
async def test_worker_lost_mid_stream_ends_the_stream_with_an_error_event(start, engines, n, how):
    bench = await start(*engines)
    broken = bench[engines[-1]]
    cut = asyncio.Event()

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        if (seen.body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            return False

        async def end(exchange: Exchange) -> None:
            await cut.wait()
            exchange.abort()

        return await _two_events_then(exchange, end)

    broken.behave = behave
    response = await bench.open("/v1/completions", {**STREAM, "n": n})
    data = await response.next_chunk()
    if how == "dies":
        cut.set()
    elif how == "leaves the table":
        bench.table(engines[-1])
    else:
        specs = [msgspec.structs.replace(broken.spec, generation=1)]
        bench.router.table.update([*(s.spec for s in bench.stubs.values() if s is not broken), *specs])
    async with asyncio.timeout(DEADLINE):
        data += await response.read(10_000)
    cut.set()
    *events, error = sse(data)
    assert {event["choices"][0]["text"] for event in events} == {"one", "two"}
    assert error["error"]["message"].startswith(engines[-1]) and error["error"]["code"].startswith("worker_")
    assert "[DONE]" not in events
    assert bench.metric("hpcserve_router_broken_streams_total") == 1
    await until(lambda: not bench.router.in_flight, "the request's end")


async def test_lost_answer_that_is_no_stream_is_cut_not_completed(start):
    bench = await start("aggregated-0")

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"application/octet-stream")])
        exchange.write(b"abc")
        await asyncio.sleep(0.05)
        exchange.abort()
        return True

    bench["aggregated-0"].behave = behave
    with pytest.raises(UpstreamError):
        await bench.ask("/v1/audio/speech", ASK)


async def test_waiting_request_moves_when_its_worker_leaves(start):
    bench = await start("aggregated-0", "aggregated-1")
    for stub in bench.stubs.values():
        stub.behave = hang
    asking = asyncio.create_task(bench.json("/v1/completions", ASK))
    await until(lambda: any(stub.running for stub in bench.stubs.values()), "the first attempt")
    (first,) = [stub for stub in bench.stubs.values() if stub.running]
    for stub in bench.stubs.values():
        stub.behave = None
    bench.table(first.name)
    assert (await asking)["choices"]
    await until(lambda: not first.running, "the first attempt's end")


async def test_restarted_worker_is_asked_again(start):
    bench = await start("aggregated-0")
    stub = bench["aggregated-0"]
    stub.behave = hang
    asking = asyncio.create_task(bench.json("/v1/completions", ASK))
    await until(lambda: stub.running, "the first attempt")
    stub.behave = None
    bench.router.table.update([msgspec.structs.replace(stub.spec, generation=1)])
    assert (await asking)["choices"]


async def test_table_that_says_the_same_again_disturbs_nothing(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].gap = 0.01
    response = await bench.open("/v1/completions", STREAM)
    for _ in range(5):
        bench.table()
        await asyncio.sleep(0.005)
    assert sse(await response.read(10_000))[-1] == "[DONE]"


async def test_least_load_goes_to_the_free_worker_and_equals_take_turns(start):
    bench = await start("aggregated-0", "aggregated-1", policy="least_load")
    bench["aggregated-0"].behave = bench["aggregated-1"].behave = hang
    first = [asyncio.create_task(bench.ask("/v1/completions", ASK)) for _ in range(6)]
    await until(lambda: all(stub.running == 3 for stub in bench.stubs.values()), "three each")
    for task in first:
        task.cancel()
    await until(lambda: not bench.router.in_flight, "the end")
    for stub in bench.stubs.values():
        stub.behave = None
        stub.seen.clear()
    for _ in range(10):
        await bench.json("/v1/completions", ASK)
    assert [len(stub.seen) for stub in bench.stubs.values()] == [5, 5]


async def test_slow_client_stops_the_engine_and_memory_stays_bounded(start):
    bench = await start("aggregated-0")
    written = 0
    event = b"data: " + b"x" * 65_000 + b"\n\n"

    async def flood(exchange: Exchange, seen: Seen) -> bool:
        nonlocal written
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        while written < 96 * 1024 * 1024 and not exchange.closed.done():
            exchange.write(event)
            written += len(event)
            await exchange.drain()
        exchange.finish()
        return True

    bench["aggregated-0"].behave = flood
    tracemalloc.start()
    response = await bench.open("/v1/completions", STREAM)
    before = -1
    while before != written:
        before = written
        await asyncio.sleep(0.2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written < 48 * 1024 * 1024
    assert peak < 8 * 1024 * 1024
    size = 0

    def count(data: bytes) -> None:
        nonlocal size
        size += len(data)

    await response.pipe(count)
    assert size == written >= 96 * 1024 * 1024


async def test_draining_refuses_new_requests_and_finishes_running_ones(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].gap = 0.05
    response = await bench.open("/v1/completions", STREAM)
    bench.router.drain("the walltime ends")
    status, headers, _ = await bench.ask("/v1/completions", ASK)
    assert status == 503 and headers["retry-after"]
    assert not bench.router.idle.is_set()
    assert sse(await response.read(10_000))[-1] == "[DONE]"
    await until(bench.router.idle.is_set, "idle")
