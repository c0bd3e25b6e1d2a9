"""Bodies that are read, and sent, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from hpcserve.http.client import Pool
from hpcserve.http.errors import UpstreamError
from hpcserve.http.server import Exchange, HttpError
from tests.patience import DEADLINE

from .conftest import Serve, until


async def test_a_body_in_pieces_arrives_as_it_was_sent(start: Serve, pool: Pool) -> None:
    sent = [bytes([number % 251]) * (1 + 7919 * number) for number in range(60)]

    async def handler(exchange: Exchange) -> None:
        got = b"".join([piece async for piece in exchange.pieces(1 << 30)])
        assert exchange.header(b"transfer-encoding") == b"chunked"
        exchange.respond(200, b"whole" if got == b"".join(sent) else b"not")

    async def pieces() -> AsyncIterator[bytes]:
        for piece in sent:
            yield piece

    url = f"http://127.0.0.1:{(await start(handler)).port}/"
    response = await pool.upload("POST", url, headers=(), pieces=pieces())
    assert (response.status, await response.read(100)) == (200, b"whole")
    await until(lambda: not pool.open_connections, "the connection to close: it is not used again")


async def test_a_receiver_that_reads_slowly_stops_the_sender(start: Serve, pool: Pool) -> None:
    go = asyncio.Event()
    sent = 0

    async def handler(exchange: Exchange) -> None:
        reading = exchange.pieces(1 << 30)
        await anext(reading)
        await go.wait()
        size = 0
        async for piece in reading:
            size += len(piece)
        exchange.respond(200, b"%d" % size)

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(4000):
            yield b"x" * 65536
            sent += 65536

    url = f"http://127.0.0.1:{(await start(handler)).port}/"
    asking = asyncio.create_task(pool.upload("POST", url, headers=(), pieces=pieces()))
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.1)
    assert 0 < sent < 64 << 20, "the sender waits for the receiver"
    go.set()
    async with asyncio.timeout(DEADLINE):
        response = await asking
        assert 0 < int(await response.read(100)) <= 4000 * 65536


async def test_too_much_is_refused_while_it_is_being_sent(start: Serve, pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        async for _ in exchange.pieces(1_000_000):
            pass
        raise AssertionError("more than the limit came through")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    url = f"http://127.0.0.1:{(await start(handler)).port}/"
    async with asyncio.timeout(DEADLINE):
        response = await pool.upload("POST", url, headers=(), pieces=endless())
        assert response.status == 413
        assert b"larger than 1000000 bytes" in await response.read(1000)


async def test_a_sender_that_breaks_off_is_no_whole_body(start: Serve, pool: Pool) -> None:
    ended: list[BaseException] = []

    async def handler(exchange: Exchange) -> None:
        try:
            async for _ in exchange.pieces(1000):
                pass
        except Exception as error:
            ended.append(error)
            raise

    async def breaks() -> AsyncIterator[bytes]:
        yield b"abc"
        raise HttpError(408, "too slow")

    url = f"http://127.0.0.1:{(await start(handler)).port}/"
    with pytest.raises(HttpError, match="too slow"):
        await pool.upload("POST", url, headers=(), pieces=breaks())
    await until(lambda: ended, "the receiver to hear of it")


async def test_a_receiver_that_dies_is_an_error(start: Serve, pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        await anext(exchange.pieces(1 << 30))
        exchange.abort()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    url = f"http://127.0.0.1:{(await start(handler)).port}/"
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(UpstreamError):
            await pool.upload("POST", url, headers=(), pieces=endless())
