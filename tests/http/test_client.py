"""The pooled client against our server and against raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from hpcserve.http.client import Pool, UpstreamError
from hpcserve.http.server import Exchange
from tests.patience import DEADLINE

from .conftest import until


@pytest.fixture
async def raw():
    """Starts servers that answer the n-th connection with `answers[n]`, whatever it is asked.

    With `close` they close then, else they wait for the client's next byte first.
    """
    servers: list[asyncio.Server] = []
    serving: set[asyncio.Task[None] | None] = set()

    async def start_one(*answers: bytes, close: bool = True) -> str:
        left = list(answers)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            serving.add(asyncio.current_task())
            with contextlib.suppress(ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(left.pop(0))
                if not close:
                    await reader.read(1)
                writer.close()
                await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"

    pool = Pool()
    yield start_one, pool
    await pool.close()
    for server in servers:
        server.close()
    await asyncio.gather(*(task for task in serving if task is not None))


async def test_connections_are_used_again_after_a_whole_answer(start, pool):
    async def handler(exchange: Exchange) -> None:
        await exchange.body(100)
        exchange.respond(200, exchange.peer.encode(), b"text/plain")

    server = await start(handler)
    peers = set()
    for _ in range(5):
        async with await pool.request("POST", f"http://127.0.0.1:{server.port}/", body=b"x") as response:
            peers.add(await response.read(100))
    assert len(peers) == 1 and pool.open_connections == 1


async def test_tasks_that_hand_connections_to_each_other_all_get_their_own_answers(start, pool):
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, await exchange.body(100), b"text/plain")

    server = await start(handler)
    url = f"http://127.0.0.1:{server.port}/"
    await (await pool.request("POST", url)).read(100)

    async def ask(name: int) -> None:
        for i in range(100):
            body = f"{name}.{i}".encode()
            assert await (await pool.request("POST", url, body=body)).read(100) == body

    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(ask(name) for name in range(8)))
    assert pool.open_connections <= 8


async def test_cancelling_a_request_that_was_just_answered_disturbs_no_other(start, pool):
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, await exchange.body(100), b"text/plain")

    server = await start(handler)
    url = f"http://127.0.0.1:{server.port}/"

    async def ask(name: int) -> None:
        body = str(name).encode()
        assert await (await pool.request("POST", url, body=body)).read(100) == body

    async with asyncio.timeout(DEADLINE):
        for i in range(200):
            first, second = asyncio.create_task(ask(1)), asyncio.create_task(ask(2))
            for _ in range(i % 20):
                await asyncio.sleep(0)
            first.cancel()
            third = asyncio.create_task(ask(3))
            await asyncio.gather(second, third)
            await asyncio.gather(first, return_exceptions=True)


async def test_aborted_answer_closes_its_connection(start, pool):
    gone = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"abc")
        await exchange.closed
        gone.set()

    server = await start(handler)
    response = await pool.request("GET", f"http://127.0.0.1:{server.port}/")
    assert await response.next_chunk() == b"abc"
    response.abort()
    await until(gone.is_set, "the server to see it")
    assert pool.open_connections == 0


async def test_cancelled_request_closes_its_connection(start, pool):
    gone = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.closed
        gone.set()

    server = await start(handler)
    request = asyncio.create_task(pool.request("GET", f"http://127.0.0.1:{server.port}/"))
    await until(lambda: server.tasks, "the request")
    request.cancel()
    await until(gone.is_set, "the server to see it")
    with pytest.raises(asyncio.CancelledError):
        await request


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    ],
    ids=["short", "no last chunk", "half a last chunk"],
)
async def test_truncated_answer_is_an_error_never_an_end(raw, answer):
    start_raw, pool = raw
    url = await start_raw(answer)
    response = await pool.request("GET", url)
    with pytest.raises(UpstreamError) as caught:
        await response.read(100)
    assert caught.value.fault == "reset"


async def test_answer_that_ends_with_the_connection_is_whole(raw):
    start_raw, pool = raw
    url = await start_raw(b"HTTP/1.1 200 OK\r\n\r\nabc")
    response = await pool.request("GET", url)
    assert await response.read(100) == b"abc"
    assert pool.open_connections == 0


async def test_interim_answers_are_skipped(raw):
    start_raw, pool = raw
    url = await start_raw(b"HTTP/1.1 103 Hint\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    response = await pool.request("GET", url)
    assert (response.status, await response.read(10)) == (200, b"ok")


@pytest.mark.parametrize(
    "answer, fault",
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000, "protocol"),
        (b"", "reset"),
    ],
    ids=["not HTTP", "length and chunks", "endless head", "nothing"],
)
async def test_broken_head_is_an_error(raw, answer, fault):
    start_raw, pool = raw
    url = await start_raw(answer)
    with pytest.raises(UpstreamError) as caught:
        await pool.request("GET", url)
    assert caught.value.fault == fault


async def test_answer_nobody_asked_for_is_not_given_to_the_next_request(raw):
    extra = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
    start_raw, pool = raw
    url = await start_raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + extra,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright",
        close=False,
    )
    assert await (await pool.request("GET", url)).read(10) == b"ok"
    assert await (await pool.request("GET", url)).read(10) == b"right"


async def test_idle_connection_closed_by_the_server_is_replaced(raw):
    start_raw, pool = raw
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    url = await start_raw(ok, ok, ok, close=False)
    for _ in range(3):
        assert await (await pool.request("POST", url, body=b"{}")).read(10) == b"ok"


async def test_refused_connection_is_an_error_of_its_own(pool):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UpstreamError) as caught:
            await pool.request("GET", f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert caught.value.fault == "connect"


async def test_unread_answer_stops_the_server(start, pool):
    written = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal written
        exchange.start(200, [])
        for _ in range(1000):
            exchange.write(b"x" * 65536)
            written += 65536
            await exchange.drain()
        exchange.finish()

    server = await start(handler)
    response = await pool.request("GET", f"http://127.0.0.1:{server.port}/")
    before = -1
    while before != written:
        before = written
        await asyncio.sleep(0.1)
    assert written < 32 * 1024 * 1024
    size = 0

    def count(data: bytes) -> None:
        nonlocal size
        size += len(data)

    await response.pipe(count)
    assert size == 1000 * 65536


async def test_reader_that_fails_gets_its_own_error(start, pool):
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"abc")
        await exchange.closed

    server = await start(handler)
    response = await pool.request("GET", f"http://127.0.0.1:{server.port}/")

    def fail(data: bytes) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError):
        await response.pipe(fail)


async def test_closing_the_pool_ends_what_runs(start):
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        await exchange.closed

    pool = Pool()
    server = await start(handler)
    response = await pool.request("GET", f"http://127.0.0.1:{server.port}/")
    reading = asyncio.create_task(response.read(10))
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(UpstreamError):
        await reading


async def test_line_break_in_a_request_header_is_refused(pool):
    with pytest.raises(ValueError):
        await pool.request("GET", "http://127.0.0.1:1/", headers=[(b"a", b"b\r\nc: d")])
