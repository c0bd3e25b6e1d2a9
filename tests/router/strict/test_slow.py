"""Clients that cost much by doing little."""

from __future__ import annotations

import asyncio
import socket

import pytest
import pytest_asyncio

from hpcserve.http.server import Exchange, Limits, bind, serve
from tests.http.answers import Replies, read_reply
from tests.http.recorder import Script
from tests.patience import DEADLINE
from tests.router.live import LiveRouter, worker

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


async def _works(port: int, request: bytes = ASK) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        reply = await read_reply(reader, Replies(), "GET", DEADLINE)
        assert reply is not None and reply.status == 200
    finally:
        writer.close()


async def test_a_thousand_idle_connections_leave_room_for_others(live):
    files, memory = live.files(), live.memory()
    idle = [await asyncio.open_connection("127.0.0.1", live.port) for _ in range(1000)]
    for _, writer in idle[::2]:
        writer.write(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Le")
    await _works(live.port)
    assert live.files() >= files + 1000
    assert live.memory() - memory < 1000 * 16 * 1024
    for _, writer in idle:
        writer.transport.abort()
    await live.until(lambda: live.files() < files + 10, "the connections to be closed")


@pytest_asyncio.fixture(loop_scope="module")
async def narrow(tmp_path, recorder):
    """A router that may open few files."""
    router = await LiveRouter(tmp_path, files=96).start()
    await router.table([worker("aggregated-0", recorder.url)])
    yield router
    await router.stop()


async def test_more_connections_than_files_are_survived(narrow):
    held = []
    for _ in range(200):
        try:
            async with asyncio.timeout(0.5):
                held.append(await asyncio.open_connection("127.0.0.1", narrow.port))
        except (OSError, TimeoutError):
            break
    assert narrow.process.poll() is None
    for _, writer in held:
        writer.transport.abort()
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await _works(narrow.port)
                break
            except (OSError, AssertionError):
                await asyncio.sleep(0.05)


async def test_answer_nobody_reads_stops_the_engine_and_not_the_router(live, recorder):
    """The engine writes 40 MB; a client that reads none of it costs the router a small part of that."""
    event = b"data: " + b"x" * 8000 + b"\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    recorder.answer = lambda seen: Script(pieces=[head, *[chunk * 50] * 100, b"0\r\n\r\n"], closes=False)
    before = live.memory()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", live.port))
        body = b'{"model":"toy","prompt":"x","stream":true}'
        await loop.sock_sendall(
            sock,
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        )
        await live.until(lambda: live.stats.get("in_flight") == 1, "the stream to run")
        for _ in range(4):
            # A report every half second: time for the engine to fill what there is to fill.
            live.stats = {}
            await live.until(lambda: live.stats, "a report")
            assert live.stats["in_flight"] == 1
        assert live.memory() - before < 8 << 20
        await _works(live.port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    await live.idle()


async def _unread(port: int, request: bytes, window: int = 4096) -> socket.socket:
    """A client that has sent its request and read nothing; `window` is what the kernel may hold for it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, request)
    return sock


# The kernel takes little here: of the small answer less is left than makes a writer wait.
@pytest.mark.parametrize("size", [60_000, 3_000_000])
@pytest.mark.parametrize(
    "last", [b"Connection: close\r\n", b"", b"Content-Length: 5\r\n"], ids=["close", "keep", "body"]
)
async def test_client_that_never_reads_its_answer_is_cut(size, last):
    """However the request ended and whether or not more requests follow: no connection stays for ever."""

    async def big(exchange: Exchange) -> None:
        exchange.respond(200, b"x" * size)

    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    limits = Limits(write_timeout=0.4, idle_timeout=0.4, body_timeout=0.4)
    server = await serve(big, sock=listener, limits=limits)
    more = ASK if not last else b""
    sock = await _unread(server.port, b"GET / HTTP/1.1\r\nHost: x\r\n" + last + b"\r\n" + more)
    try:
        async with asyncio.timeout(DEADLINE):
            while not server.connections:  # noqa: ASYNC110 - a test may poll
                await asyncio.sleep(0.01)
            while server.connections:  # noqa: ASYNC110 - a test may poll
                await asyncio.sleep(0.02)
    finally:
        sock.close()
        await server.close()


async def test_client_that_reads_slowly_but_steadily_gets_all():
    """The time between requests does not run while an answer is still being read."""
    size = 16_000_000

    async def big(exchange: Exchange) -> None:
        exchange.respond(200, b"x" * size)

    server = await serve(big, limits=Limits(idle_timeout=0.3))
    sock = await _unread(server.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", window=1 << 18)
    loop = asyncio.get_running_loop()
    got = 0
    try:
        async with asyncio.timeout(DEADLINE):
            while got < size:
                data = await loop.sock_recv(sock, 1 << 18)
                assert data, f"cut after {got} bytes"
                got += len(data)
                await asyncio.sleep(0.02)
    finally:
        sock.close()
        await server.close()
