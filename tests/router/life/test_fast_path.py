"""The fast path does what the task does, and leaves nothing behind however a request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from hpcserve.http.compiled import PURE, compiled
from hpcserve.http.exchange import Exchange
from hpcserve.router import fast_path
from tests.router.stubs import KEY, Bench, Seen, answer_with, sse, until

STREAM = {"model": "toy", "prompt": "a b c d", "max_tokens": 4, "stream": True}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "stream": True}
Behaviour = Callable[[Exchange, Seen], Awaitable[bool]]


def event(text: str, ids: str, reason: str = "null", *, chat: bool) -> bytes:
    """One token as vLLM writes it."""
    part = f'"delta":{{"content":"{text}"}}' if chat else f'"text":"{text}"'
    return (
        f'data: {{"id":"cmpl-1","object":"x","created":1,"model":"toy","choices":[{{"index":0,{part},'
        f'"logprobs":null,"finish_reason":{reason},"stop_reason":null,"token_ids":[{ids}]}}]}}\n\n'
    ).encode()


def writes(count: int, *, gap: float = 0.002, size: int = 1) -> Behaviour:
    """A behaviour: `count` tokens with `size` letters each, one piece each."""

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        if not (seen.body or {}).get("stream"):
            return False
        chat = "messages" in seen.body
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        for number in range(count):
            exchange.write(event(chr(97 + number % 26) * size, str(number), chat=chat))
            await exchange.drain()
            await asyncio.sleep(gap)
            if exchange.closed.done():
                return True
        exchange.write(event("", "7", '"length"', chat=chat))
        exchange.write(b"data: [DONE]\n\n")
        exchange.finish()
        return True

    return behave


def idle(bench: Bench) -> bool:
    """Nothing is left of any request."""
    router = bench.router
    loads = [load for worker in router.table.all() for load in worker.load.read()]
    held = (router.admission.prefill.total, router.admission.kv.total, router.admission.bodies.held)
    leases = [worker.leases for worker in router.table.all()]
    return not (router.in_flight or router.fast_path.flights or any(loads) or any(held) or any(leases))


@pytest.fixture(params=["compiled", "no pump", "pure"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no pump":
        monkeypatch.setattr(fast_path, "compiled", lambda: None)
    if request.param == "pure":
        monkeypatch.setenv(PURE, "1")
    return str(request.param)


@pytest.mark.parametrize("body", [STREAM, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("roles", [("aggregated-0",), ("prefill-0", "decode-0")], ids=["one", "pair"])
async def test_a_stream_comes_whole_and_without_the_ids_it_did_not_ask_for(start, way, roles, body):
    bench = await start(*roles)
    bench[roles[-1]].behave = writes(60)
    path = "/v1/chat/completions" if body is CHAT else "/v1/completions"
    status, headers, data = await bench.ask(path, body)
    assert status == 200
    assert headers["transfer-encoding"] == "chunked"
    choices = [event["choices"][0] for event in sse(data)[:-1]]
    texts = [choice["delta"]["content"] if body is CHAT else choice["text"] for choice in choices]
    assert "".join(texts) == "".join(chr(97 + n % 26) for n in range(60))
    assert {choice["token_ids"] for choice in choices} == {None}
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_steady_streams_ride_on_the_pump(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = writes(400)
    response = await bench.open("/v1/completions", STREAM)
    await until(lambda: len(bench.router.fast_path.pump.pump) == 1, "the stream on the pump")
    [flight] = bench.router.fast_path.flights
    before = flight.pieces
    await until(lambda: flight.pieces > before + 10, "pieces that the pump counts")
    data = await response.read(1 << 20)
    assert data.count(b'"text":') == 401
    assert data.endswith(b"[DONE]\n\n")
    assert len(bench.router.fast_path.pump.pump) == 0
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_client_that_reads_slowly_holds_up_its_engine_alone_and_gets_all(start, way):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = writes(4000, gap=0.0, size=10_000)
    response = await bench.open("/v1/completions", STREAM)
    response.pause()
    await until(lambda: bench["aggregated-0"].running == 1, "the stream's start")
    other = writes(5)
    await asyncio.sleep(0.3)
    assert bench["aggregated-0"].running == 1, "the engine wrote 40 MB that nobody read"
    bench["aggregated-0"].behave = other
    assert (await bench.ask("/v1/completions", STREAM))[0] == 200
    data = await response.read(1 << 28)
    texts = [item["choices"][0]["text"] for item in sse(data)[:-1]]
    assert "".join(texts) == "".join(chr(97 + n % 26) * 10_000 for n in range(4000))
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_client_that_leaves_ends_the_engines_request(start, way):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = writes(10_000)
    response = await bench.open("/v1/completions", STREAM)
    for _ in range(20):
        await response.next_chunk()
    response.abort()
    await until(lambda: bench["aggregated-0"].running == 0, "the end of the engine's request")
    await until(lambda: idle(bench), "the end of all bookkeeping")
    assert bench.metric('hpcserve_router_cancelled_total{route="/v1/completions"}') == 1
    assert bench.metric('hpcserve_router_requests_total{route="/v1/completions",status="200"}') == 1


async def test_a_connection_that_was_closed_while_idle_is_replaced(start):
    bench = await start("aggregated-0")
    assert (await bench.ask("/v1/completions", STREAM))[0] == 200
    first = bench["aggregated-0"].server.connections.copy()
    # Not closed in good time, but under the request: it is written to a connection that ends meanwhile.
    for connection in first:
        connection.abort()
    assert (await bench.ask("/v1/completions", STREAM))[0] == 200
    assert bench.metric("hpcserve_router_errors_total") == 0
    assert bench.suspects == []


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_an_engines_refusal_is_passed_on_in_its_own_words(start, status):
    bench = await start("aggregated-0", "aggregated-1")
    for name in ("aggregated-0", "aggregated-1"):
        bench[name].behave = answer_with(status, "not like this")
    found, error = await bench.error("/v1/completions", STREAM)
    assert (found, error["message"]) == (status, "not like this")
    assert sum(len(bench[name].seen) for name in bench.stubs) == 1
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_whole_answer_to_a_request_for_a_stream_is_passed_on(start):
    bench = await start("aggregated-0")

    async def whole(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"application/json")], length=2)
        await asyncio.sleep(0.05)
        exchange.write(b"{}")
        exchange.finish()
        return True

    bench["aggregated-0"].behave = whole
    assert await bench.json("/v1/completions", STREAM) == {}
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_worker_taken_away_before_the_first_byte_is_replaced(start):
    bench = await start("aggregated-0", "aggregated-1")
    asked = asyncio.Event()

    async def hangs(exchange: Exchange, seen: Seen) -> bool:
        asked.set()
        await exchange.closed
        return True

    bench["aggregated-0"].behave = bench["aggregated-1"].behave = hangs
    running = asyncio.create_task(bench.ask("/v1/completions", STREAM))
    await asked.wait()
    gone = next(name for name in bench.stubs if bench[name].running)
    other = next(name for name in bench.stubs if name != gone)
    bench[other].behave = writes(3)
    bench.table(gone)
    status, _, data = await running
    assert status == 200
    assert data.endswith(b"[DONE]\n\n")
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_fault_of_our_own_is_a_500_and_leaves_nothing(start, monkeypatch, caplog):
    bench = await start("aggregated-0")
    monkeypatch.setattr(bench.router.placer, "place", lambda *a, **k: 1 / 0)
    status, _, data = await bench.ask("/v1/completions", STREAM)
    assert (status, msgspec.json.decode(data)["error"]["message"]) == (500, "internal error")
    assert "ZeroDivisionError" in caplog.text
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_fault_before_the_request_was_let_in_is_a_tasks_to_tell(start, monkeypatch, caplog):
    bench = await start("aggregated-0")
    monkeypatch.setattr(fast_path, "ask", lambda fields: 1 / 0)
    monkeypatch.setattr(compiled("router.lane", "a test"), "ask", lambda fields: 1 / 0)
    asks = STREAM | {"stream_options": {"include_usage": True}}
    assert (await bench.ask("/v1/completions", asks))[0] == 200
    assert "the fast path failed" in caplog.text
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_stream_that_is_not_chunked_never_boards_the_pump(start):
    bench = await start("aggregated-0")

    async def unframed(exchange: Exchange, seen: Seen) -> bool:
        body = b"".join(event("a", str(n), chat=False) for n in range(40)) + b"data: [DONE]\n\n"
        exchange.start(200, [(b"content-type", b"text/event-stream")], length=len(body))
        for place in range(0, len(body), 50):
            exchange.write(body[place : place + 50])
            await asyncio.sleep(0.001)
        exchange.finish()
        return True

    bench["aggregated-0"].behave = unframed
    status, _, data = await bench.ask("/v1/completions", STREAM)
    assert status == 200
    assert data.count(b'"text":"a"') == 40
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_prefill_worker_that_refuses_leaves_the_last_word_to_decode(start):
    bench = await start("prefill-0", "decode-0")
    bench["prefill-0"].behave = answer_with(400, "not on prefill")
    assert (await bench.ask("/v1/completions", STREAM))[0] == 200
    line = 'hpcserve_router_kv_legs_total{result="local",reason="prefill_refused"}'
    assert bench.metric(line) == 1
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_prefill_worker_without_kv_leaves_the_prompt_to_decode(start):
    bench = await start("prefill-0", "decode-0")
    bench["prefill-0"].kv = None
    assert (await bench.ask("/v1/completions", STREAM))[0] == 200
    assert bench.metric('hpcserve_router_kv_legs_total{result="local",reason="no_kv"}') == 1
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def send_in_pieces(
    bench: Bench, body: bytes, pieces: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request whose body comes in `pieces` but the last, with its writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.server.port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n"
    )
    writer.write(head.format(KEY, len(body)).encode())
    step = -(-len(body) // pieces)
    for at in range(0, len(body) - step, step):
        writer.write(body[at : at + step])
        await writer.drain()
        await asyncio.sleep(0.02)
    return reader, writer


async def test_a_body_that_comes_in_pieces_flies_once_it_is_whole(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = writes(40)
    body = msgspec.json.encode(STREAM | {"prompt": "a long prompt " * 10_000})
    reader, writer = await send_in_pieces(bench, body, 4)
    assert not bench.router.fast_path.flights
    assert bench.router.in_flight == 1
    writer.write(body[3 * -(-len(body) // 4) :])
    await until(lambda: bench.router.fast_path.flights, "the flight")
    data = await reader.readuntil(b"0\r\n\r\n")
    assert data.count(b'"text":') == 41
    assert bench.router.requests == 1
    assert bench.metric('hpcserve_router_requests_total{route="/v1/completions",status="200"}') == 1
    # The connection serves on.
    bench["aggregated-0"].behave = writes(3)
    small = msgspec.json.encode(STREAM)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % KEY.encode())
    writer.write(b"Content-Length: %d\r\n\r\n" % len(small) + small)
    assert (await reader.readuntil(b"0\r\n\r\n")).count(b'"text":') == 4
    writer.close()
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_who_leaves_in_the_middle_of_a_body_leaves_nothing(start):
    bench = await start("aggregated-0")
    body = msgspec.json.encode(STREAM | {"prompt": "a long prompt " * 10_000})
    _, writer = await send_in_pieces(bench, body, 4)
    assert bench.router.admission.bodies.held
    writer.transport.abort()
    await until(lambda: idle(bench), "the end of all bookkeeping")
    assert bench.metric('hpcserve_router_cancelled_total{route="/v1/completions"}') == 1
    assert bench["aggregated-0"].seen == []
