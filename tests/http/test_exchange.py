"""What the server does with well-formed requests."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from hpcserve.http.server import ClientGone, Exchange, HttpError

from .conftest import until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def _echo(exchange: Exchange) -> None:
    exchange.respond(200, await exchange.body(10_000_000), b"text/plain")


async def test_pipelined_requests_are_answered_in_order_one_at_a_time(start, connect):
    running = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        exchange.respond(200, exchange.path.encode(), b"text/plain")

    client = await connect(await start(handler))
    client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(20)))
    assert [(await client.response())[2] for _ in range(20)] == [b"/%d" % i for i in range(20)]


async def test_pipelined_bodies_belong_to_their_requests(start, connect):
    client = await connect(await start(_echo))
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"1" * 300_000
    two = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    two += b"2\r\n22\r\n1\r\n2\r\n0\r\nT: 1\r\n\r\n"
    client.send(one + two)
    assert (await client.response())[2] == b"1" * 300_000
    assert (await client.response())[2] == b"222"


async def test_http_1_0_ends_with_the_connection_unless_it_asks_to_keep_it(start, connect):
    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"abc")
        exchange.finish()

    server = await start(stream)
    client = await connect(server)
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert await client.rest() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"
    keeping = await connect(await start(_echo))
    keeping.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
    assert (await keeping.response())[1]["connection"] == "keep-alive"
    assert (await keeping.response())[0] == 200


async def test_head_gets_the_head_only(start, connect):
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, b"body", b"text/plain")

    client = await connect(await start(handler))
    client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await client.rest()
    assert b"content-length: 4\r\n" in answer and answer.endswith(b"\r\n\r\n")


async def test_continue_is_sent_only_when_the_body_is_wanted(start, connect):
    async def handler(exchange: Exchange) -> None:
        if exchange.path == "/no":
            raise HttpError(403, "no")
        exchange.respond(200, await exchange.body(10), b"text/plain")

    server = await start(handler)
    head = b" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    wanted = await connect(server)
    wanted.send(b"POST /yes" + head)
    assert await wanted.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wanted.send(b"ok")
    assert (await wanted.response())[2] == b"ok"
    refused = await connect(server)
    refused.send(b"POST /no" + head)
    assert (await refused.response())[0] == 403
    assert await refused.rest() == b""


async def test_absolute_targets_and_upgrades_are_plain_requests(start, connect):
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, f"{exchange.path}|{exchange.query}".encode(), b"text/plain")

    client = await connect(await start(handler))
    client.send(b"GET http://h:1/a?b=c HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await client.response())[2] == b"/a|b=c"
    client.send(b"GET /u HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + GET)
    assert (await client.response())[2] == b"/u|"
    assert (await client.response())[2] == b"/|"


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("step", [1, 10_000])
async def test_body_of_a_request_that_offers_an_upgrade_is_read(start, connect, framing, step):
    """As Java's HttpClient sends every request by default."""
    client = await connect(await start(_echo))
    one = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + framing
    data = (one + GET) * 2
    for at in range(0, len(data), step):
        client.send(data[at : at + step])
        await client.writer.drain()
    assert [(await client.response())[2] for _ in range(4)] == [b"abc", b"", b"abc", b""]


async def test_client_that_pipelines_and_leaves_is_noticed(start, connect):
    cancelled = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    server = await start(handler, cancel_on_disconnect=True)
    client = await connect(server)
    client.send(GET * 3)
    await until(lambda: server.tasks, "the request")
    await asyncio.sleep(0.05)
    await client.close()
    await until(cancelled.is_set, "the cancellation")
    await until(lambda: not server.connections and not server.tasks, "nothing left")


async def test_response_header_with_a_line_break_is_never_sent(start, connect):
    async def handler(exchange: Exchange) -> None:
        try:
            exchange.respond(200, b"", headers=[(b"x-a", b"b\r\nset-cookie: c")])
        except ValueError:
            exchange.abort()

    client = await connect(await start(handler))
    client.send(GET)
    assert await client.rest() == b""


async def test_handler_that_fails_is_a_500_and_after_the_start_a_cut(start, connect, caplog):
    async def handler(exchange: Exchange) -> None:
        if exchange.path == "/late":
            exchange.start(200, [])
            exchange.write(b"abc")
        raise RuntimeError("boom")

    server = await start(handler)
    client = await connect(server)
    client.send(GET)
    status, _, body = await client.response()
    assert status == 500 and b"boom" not in body
    client.send(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = await client.rest()
    assert not answer.endswith(b"0\r\n\r\n")
    assert "boom" in caplog.text


async def test_answer_shorter_than_announced_is_cut(start, connect):
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [], length=10)
        exchange.write(b"abc")
        exchange.finish()

    client = await connect(await start(handler))
    client.send(GET)
    try:
        await client.response()
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return
    raise AssertionError("the client took a short answer for whole")


async def test_client_gone_is_seen_while_waiting_and_while_reading_a_body(start, connect):
    seen: list[str] = []

    async def handler(exchange: Exchange) -> None:
        if exchange.method == "POST":
            try:
                await exchange.body(100)
            except ClientGone:
                seen.append("body")
                raise
        await exchange.closed
        seen.append("wait")

    server = await start(handler)
    waiting = await connect(server)
    waiting.send(GET)
    await until(lambda: server.tasks, "the request")
    await waiting.close()
    await until(lambda: seen == ["wait"], "the end of the wait")
    reading = await connect(server)
    reading.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nabc")
    await until(lambda: server.tasks, "the request")
    await reading.close()
    await until(lambda: seen == ["wait", "body"], "the end of the body")
    await until(lambda: not server.connections and not server.tasks, "nothing left")


async def test_handler_is_cancelled_with_its_client_when_asked(start, connect):
    cancelled = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    server = await start(handler, cancel_on_disconnect=True)
    client = await connect(server)
    client.send(GET)
    await until(lambda: server.tasks, "the request")
    await client.close()
    await until(cancelled.is_set, "the cancellation")


async def test_slow_reader_holds_the_writer_back(start, connect):
    written = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal written
        exchange.start(200, [])
        for _ in range(1000):
            exchange.write(b"x" * 65536)
            written += 65536
            await exchange.drain()
        exchange.finish()

    client = await connect(await start(handler))
    client.send(GET)
    before = -1
    while before != written:
        before = written
        await asyncio.sleep(0.1)
    assert written < 32 * 1024 * 1024
    status, _, body = await client.response()
    assert (status, len(body)) == (200, 1000 * 65536)


async def test_close_lets_running_exchanges_finish(start, connect):
    release = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await release.wait()
        exchange.respond(200, b"done", b"text/plain")

    server = await start(handler)
    busy, idle = await connect(server), await connect(server)
    busy.send(GET)
    await until(lambda: server.tasks, "the request")
    closing = asyncio.create_task(server.close(10))
    assert await idle.rest() == b""
    release.set()
    assert (await busy.response())[2] == b"done"
    assert await busy.rest() == b""
    await closing
