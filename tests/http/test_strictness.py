"""What a server must refuse, so that nobody behind it sees another request than it did."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

from hpcserve.http.server import Exchange, Limits

from .corpus import ALL, BODIES
from .corpus.case import NEXT

HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

CASES = {name: case for name, case in ALL.items() if name not in BODIES}
REFUSED = {name: case for name, case in CASES.items() if not case.got}


async def _echo(exchange: Exchange) -> None:
    body = await exchange.body(1000)
    exchange.respond(200, body, b"application/octet-stream")


async def _mirror(exchange: Exchange) -> None:
    """What the server made of a request, as its answer."""
    body = await exchange.body(1_000_000)
    told = b"%b %b %b" % (exchange.method.encode(), exchange.target.encode(), body)
    exchange.respond(
        200, told, b"application/octet-stream", [(b"x-got", hashlib.sha256(told).hexdigest().encode())]
    )


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
async def test_refused_with_a_status_and_a_closed_connection(start, connect, case, whole):
    client = await connect(await start(_mirror))
    for piece in [case.data + NEXT] if whole else case.pieces():
        client.send(piece)
        await asyncio.sleep(0)
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 %d " % case.status), answer[:200]
    assert len(re.findall(rb"HTTP/1.1 \d{3} ", answer)) == 1
    assert b'{"error":{"message":' in answer


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
async def test_served_as_the_corpus_says(start, connect, name, whole):
    case = CASES[name]
    client = await connect(await start(_mirror))
    for piece in [case.data + NEXT] if whole else case.pieces():
        client.send(piece)
        await asyncio.sleep(0)
    if case.goes_on:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await client.rest()
    told = [f"{got.method} {got.target} ".encode() + got.body for got in case.got]
    if case.goes_on:
        told += [b"GET /version?next ", b"GET / "]
    marks = re.findall(rb"x-got: ([0-9a-f]+)", answer)
    assert marks == [hashlib.sha256(text).hexdigest().encode() for text in told]


async def test_requests_before_a_broken_one_are_answered(start, connect):
    client = await connect(await start(_echo))
    client.send(HEAD + b"Content-Length: 3\r\n\r\none" + b"GET / HTTP/1.1\nHost: x\n\n")
    assert await client.response() == (
        200, {"content-type": "application/octet-stream", "content-length": "3"}, b"one"
    )  # fmt: skip
    assert (await client.response())[0] == 400
    assert await client.rest() == b""


async def test_body_above_the_limit_announced_or_chunked(start, connect):
    server = await start(_echo)
    announced = await connect(server)
    announced.send(HEAD + b"Content-Length: 1001\r\n\r\n")
    assert (await announced.response())[0] == 413
    chunked = await connect(server)
    chunked.send(CHUNKED + b"3e9\r\n" + b"x" * 1001 + b"\r\n")
    status, headers, _ = await chunked.response()
    assert (status, headers["connection"]) == (413, "close")


async def test_client_that_still_sends_reads_the_refusal(start, connect):
    """Closing a socket with unread input resets it, and the answer would be lost."""
    client = await connect(await start(_echo))
    client.send(HEAD + b"Content-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)
    assert (await client.rest()).startswith(b"HTTP/1.1 413 ")


async def test_slow_head_is_timed_out_however_it_trickles(start, connect):
    client = await connect(await start(_echo, limits=Limits(head_timeout=0.3)))
    client.send(b"GET / HTTP/1.1\r\n")

    async def trickle() -> None:
        while True:
            client.send(b"A: b\r\n")
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    assert (await client.response())[0] == 408
    trickling.cancel()


async def test_slow_body_is_timed_out(start, connect):
    client = await connect(await start(_echo, limits=Limits(body_timeout=0.3)))
    client.send(HEAD + b"Content-Length: 10\r\n\r\nabc")
    assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_silent_connection_is_closed(start, connect):
    client = await connect(await start(_echo, limits=Limits(head_timeout=0.2, idle_timeout=0.2)))
    assert await client.rest() == b""
    again = await connect(await start(_echo, limits=Limits(idle_timeout=0.2)))
    again.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await again.response())[0] == 200
    assert await again.rest() == b""


async def test_flood_of_pipelined_requests_is_bounded(start, connect):
    client = await connect(await start(_echo))
    client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
    answers = await client.rest()
    assert b"HTTP/1.1 429 " in answers
    assert answers.count(b"HTTP/1.1 200 ") <= 100
