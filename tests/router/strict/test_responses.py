"""Engines that answer badly: no client takes a part for the whole, or gets another client's bytes."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.http.answers import Broken, Replies, Reply, read_reply
from tests.http.corpus.responses import AND_MORE, BAD, GOOD, Answer
from tests.http.recorder import Script, Seen, echo
from tests.patience import DEADLINE

pytestmark = pytest.mark.asyncio(loop_scope="module")

ERROR_EVENT = re.compile(rb'data: \{"error":[^\n]*\n\n\Z')


class Client:
    """A connection to the router."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._replies = Replies()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    async def ask(self, *, stream: bool = False) -> Reply | None:
        """One completion. Raises Broken when its answer breaks off."""
        body = b'{"model":"toy","prompt":"x","max_tokens":3,"stream":%b}' % (b"true" if stream else b"false")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._writer.write(head + body)
        return await read_reply(self._reader, self._replies, "POST", DEADLINE)


def answer_with(answer: Answer, pieces: list[bytes] | None = None):
    def write(seen: Seen) -> Script:
        return Script(pieces=pieces or [answer.data], closes=answer.closes)

    return write


async def one(live, *, stream: bool) -> Reply | None:
    """The answer on a fresh connection; None when it broke off, or never began."""
    async with Client(live.port) as client:
        try:
            return await client.ask(stream=stream)
        except (Broken, ConnectionError):
            return None


async def next_is_clean(live, recorder) -> None:
    """Whoever comes next gets the answer to its own request."""
    recorder.answer = echo
    await live.restarted()
    async with Client(live.port) as client:
        for _ in range(3):
            reply = await client.ask()
            assert reply is not None and reply.status == 200
            assert b'"number": %d,' % recorder.seen[-1].number in reply.body


def split(data: bytes) -> list[bytes]:
    step = max(1, len(data) // 200)
    return [data[at : at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", GOOD.values(), ids=GOOD)
async def test_good_answers_arrive(live, recorder, answer, stream):
    await live.restarted()
    for pieces in ([answer.data], split(answer.data)):
        recorder.answer = answer_with(answer, pieces)
        reply = await one(live, stream=stream)
        assert reply is not None and (reply.status, reply.body) == (answer.status, answer.body)
    await next_is_clean(live, recorder)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
async def test_bad_answers_are_not_taken_for_whole(live, recorder, answer, stream):
    await live.restarted()
    recorder.answer = answer_with(answer)
    reply = await one(live, stream=stream)
    if reply is not None:
        assert reply.status in (502, 503) or ERROR_EVENT.search(reply.body), reply
        assert b"internal error" not in reply.body
    await next_is_clean(live, recorder)


@pytest.mark.parametrize("answer", AND_MORE.values(), ids=AND_MORE)
async def test_bytes_behind_an_answer_reach_nobody(live, recorder, answer):
    await live.restarted()
    recorder.answer = answer_with(answer)
    for _ in range(5):
        reply = await one(live, stream=False)
        if reply is not None:
            assert b"smuggled" not in reply.body and b"noise" not in reply.body
            assert reply.status in (answer.status, 502, 503)
            assert reply.body == answer.body or reply.status != answer.status
    await next_is_clean(live, recorder)


@pytest.mark.parametrize("name", ["a length", "chunks", "a stream", "100 first"])
async def test_engine_that_closes_at_any_byte(live, recorder, name):
    """Up to the last byte that its framing needs, an early end shows."""
    answer = GOOD[name]
    for size in range(len(answer.data)):
        if size % 16 == 0:
            await live.restarted()
        recorder.answer = answer_with(Answer(data=answer.data[:size], closes=True))
        reply = await one(live, stream=name == "a stream")
        if reply is not None:
            assert reply.status in (502, 503) or ERROR_EVENT.search(reply.body), (size, reply)
    await next_is_clean(live, recorder)
