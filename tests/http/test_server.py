"""The listening server, on the event loop that the router has."""

from __future__ import annotations

import asyncio
import os
import socket

import uvloop

from hpcserve.http.server import Exchange, serve

CLIENTS = 64
TURNS = 8


async def _hello(exchange: Exchange) -> None:
    exchange.respond(200, b"{}")


def test_clients_that_come_together_are_accepted_in_a_few_turns_of_the_loop() -> None:
    """One in a turn, as libuv does it, would let the last one wait for 64 turns full of others' requests."""

    async def accepted() -> int:
        server = await serve(_hello)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CLIENTS)]
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            return len(server.connections)
        finally:
            for client in clients:
                client.close()
            await server.close()

    assert uvloop.run(accepted()) == CLIENTS


def test_a_server_that_closed_left_no_file_open_and_no_port_taken() -> None:
    async def listen(port: int = 0) -> int:
        server = await serve(_hello, port=port)
        await server.close()
        return server.port

    port = uvloop.run(listen())
    before = len(os.listdir("/proc/self/fd"))
    assert uvloop.run(listen(port)) == port
    assert len(os.listdir("/proc/self/fd")) == before
