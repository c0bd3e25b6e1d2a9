from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from hpcserve.http.client import Pool
from hpcserve.http.server import Handler, Server, serve
from tests.patience import DEADLINE

Serve = Callable[..., Awaitable[Server]]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Returns when the condition is true; fails the test after a deadline."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.005)
    assert condition(), what


class Raw:
    """A client that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """The next response whose length is announced, or which is chunked."""
        async with asyncio.timeout(DEADLINE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = {}
            for line in lines[1:-2]:
                name, _, value = line.partition(": ")
                headers[name] = value
            body = b""
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                pieces = []
                while size := int(await self.reader.readline(), 16):
                    pieces.append(await self.reader.readexactly(size))
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
                body = b"".join(pieces)
        return int(lines[0].split(" ")[1]), headers, body

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(DEADLINE):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()


@pytest.fixture
async def start() -> AsyncIterator[Serve]:
    """Starts servers, and closes them after the test."""
    servers: list[Server] = []

    async def start_one(handler: Handler, **options: Any) -> Server:
        server = await serve(handler, **options)
        servers.append(server)
        return server

    yield start_one
    for server in servers:
        await server.close()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Server], Awaitable[Raw]]]:
    clients: list[Raw] = []

    async def connect_one(server: Server) -> Raw:
        client = Raw(*await asyncio.open_connection("127.0.0.1", server.port))
        clients.append(client)
        return client

    yield connect_one
    for client in clients:
        await client.close()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    await pool.close()
