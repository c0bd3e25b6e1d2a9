"""The corpus through a router: what it refuses never reaches an engine, what it serves arrives as one."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.http.answers import Replies, Reply, read_reply
from tests.http.corpus import ALL, BODIES
from tests.http.corpus.case import NEXT, Case, Got, get
from tests.http.fuzz_requests import same_body
from tests.patience import DEADLINE

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _exchange(port: int, pieces: list[bytes], methods: list[str], *, to_end: bool) -> list[Reply]:
    """The answers to one connection's bytes: as many as `methods`, or all until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        replies = Replies()
        found = []
        for method in methods:
            reply = await read_reply(reader, replies, method, DEADLINE)
            if reply is None:
                return found
            found.append(reply)
        if to_end:
            assert await read_reply(reader, replies, "GET", DEADLINE) is None
        return found
    finally:
        writer.close()


async def _check(live, recorder, case: Case, pieces: list[bytes]) -> None:
    recorder.seen.clear()
    status = case.status if case.routed else 404
    got = [*(case.got if case.routed else ()), *([get("/version?next")] if case.goes_on else [])]
    answers = len(got) + (status != 200)
    methods = [one.method for one in got] if status == 200 else []
    expected = [*methods, *["GET"] * (answers - len(methods))]
    if not case.goes_on and status == 200:
        # A refusal of what comes behind it.
        expected.append("GET")
    found = await _exchange(live.port, pieces, expected, to_end=not case.goes_on)
    assert found, "the connection ended without an answer"
    assert found[0].status == status, found[0]
    if case.goes_on:
        assert len(found) == answers and not found[-1].closes
    else:
        assert found[-1].closes
    for reply in found:
        if reply.status != 200:
            error = json.loads(reply.body)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
    seen = [one.got for one in recorder.seen]
    assert len(seen) == len(got), seen
    for want, have in zip(got, seen, strict=True):
        assert (have.method, have.target) == (want.method, want.target)
        assert same_body(want.body, have.body), (want.body[:300], have.body[:300])
    for one in recorder.seen:
        assert _added(one.headers, one.method) == [], one.headers


def _added(headers: list[tuple[bytes, bytes]], method: str) -> list[bytes]:
    """Headers an engine must not get, or get once and did not."""
    names = [name for name, _ in headers]
    odd = [
        name
        for name in (b"transfer-encoding", b"upgrade", b"expect", b"te", b"http2-settings")
        if name in names
    ]
    needed = [b"host", b"x-request-id", *([b"content-length"] if method == "POST" else [])]
    return odd + [name for name in needed if names.count(name) != 1]


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
async def test_whole(live, recorder, case):
    await _check(live, recorder, case, [case.data + NEXT])


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
async def test_in_pieces(live, recorder, case):
    await _check(live, recorder, case, case.pieces())


@pytest.mark.parametrize("name", ["a length, then chunks", "a bare LF after a header", "dots up"])
async def test_head_of_the_line_is_not_lost(live, recorder, name):
    """What stood before a refused request is answered."""
    case = ALL[name]
    found = await _exchange(live.port, [NEXT + case.data + NEXT], ["GET", "GET"], to_end=True)
    assert [reply.status for reply in found] == [200, case.status]
    assert [seen.got for seen in recorder.seen] == [get("/version?next")]


async def test_json_of_the_corpus_reads_the_same_in_all_parsers():
    """The cases that are served leave nothing to interpretation."""
    import msgspec
    import pydantic_core

    for name, case in BODIES.items():
        if case.status == 200:
            body = case.got[0].body
            assert json.loads(body) == msgspec.json.decode(body) == pydantic_core.from_json(body), name


@pytest.mark.parametrize(
    "escaped, plain",
    [
        (b"/v1/completion%73", None),
        (b"/v1%2fcompletions", "/v1/completions"),
        (b"/v1/chat%2Fcompletions", "/v1/chat/completions"),
        (b"http://evil/v1/completions", "/v1/completions"),
    ],
)
async def test_no_spelling_of_a_route_escapes_its_checks(live, recorder, escaped, plain):
    """An engine decodes the path before it looks for a route; the router must have done so too."""
    body = b'{"model":"not served","prompt":"x","messages":[]}'
    request = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (escaped, len(body), body)
    found = await _exchange(live.port, [request], ["POST"], to_end=False)
    assert found[0].status == (400 if plain is None else 404), found[0]
    assert recorder.seen == []


async def test_expectation_is_met_once_and_only_when_the_body_is_wanted(live, recorder):
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % (b"/tokenize", 3))
    async with asyncio.timeout(DEADLINE):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{ }")
    reply = await read_reply(reader, Replies(), "POST", DEADLINE)
    assert reply is not None and (reply.status, reply.interim) == (200, 0)
    writer.write(head % (b"/tokenize", 1 << 40))
    reply = await read_reply(reader, Replies(), "POST", DEADLINE)
    assert reply is not None and (reply.status, reply.interim, reply.closes) == (413, 0, True)
    writer.close()
    assert [seen.got for seen in recorder.seen] == [Got(method="POST", target="/tokenize", body=b"{ }")]
