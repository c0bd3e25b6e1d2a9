"""A head that is known is one that the strict parser reads, and reads just so."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.http.compiled import compiled
from hpcserve.http.connection import Connection
from hpcserve.http.exchange import Exchange
from hpcserve.http.limits import Limits
from hpcserve.http.upstream import UpstreamConnection

from .corpus import ALL
from .mutations import Mutator

cache = compiled("http.head_cache", "a test")
assert cache is not None, "`make venv` compiles it, with a C compiler and Python's headers"

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\nAccept: */*\r\n\r\n"
)
ROUNDS = 4000


class Wire:
    """A transport that sends nothing."""

    def __init__(self) -> None:
        self.closed = False

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: 0


class Host:
    """A server that only looks at what comes."""

    def __init__(self) -> None:
        self.handler = self.express = None
        self.limits = Limits()
        self.cancel_on_disconnect = self.closing = False
        self.connections: set[Connection] = set()
        self.tasks: set[Any] = set()
        self.seen: list[Exchange] = []

    def quick(self, exchange: Exchange) -> bool:
        self.seen.append(exchange)
        return True

    def left(self, connection: Connection) -> None:
        pass


def parsed(data: bytes) -> tuple[Any, ...] | None:
    """What the strict parser makes of the first request in `data`; None unless that is whole."""
    host = Host()
    connection = Connection(host)  # type: ignore[arg-type]
    connection.connection_made(Wire())  # type: ignore[arg-type]
    connection.data_received(data)
    if not host.seen:
        return None
    one = host.seen[0]
    return one.method, one.target, one.path, one.headers, one._minor, one._keep, one.whole()


async def known() -> tuple[Any, list[bytes]]:
    """The cache after all of the corpus that is served, and what it was taught."""
    heads = cache.Heads()
    taught = []
    for data in [
        HEAD % 3 + b"abc",
        *(case.data for case in ALL.values() if case.got and len(case.data) < 10_000),
    ]:
        found = parsed(data)
        if found is not None and heads.keep(data, found[3], found):
            taught.append(data)
    return heads, taught


@pytest.mark.parametrize("seed", range(4))
async def test_what_is_found_is_what_the_parser_reads(seed: int) -> None:
    heads, taught = await known()
    assert len(taught) > 3
    mutator = Mutator(taught, seed)
    hits = 0
    for number in range(ROUNDS):
        data = mutator.message(3)
        found = heads.find(data)
        if found is None:
            continue
        (method, target, path, headers, minor, keep, _), end, length = found
        body = data[end:]
        if length < 0 or len(body) != length:
            continue
        hits += 1
        told = [(name, b"%d" % length if name == b"content-length" else value) for name, value in headers]
        again = parsed(data)
        assert again is not None, data
        read = [
            (name, b"%d" % int(value) if name == b"content-length" else value) for name, value in again[3]
        ]
        assert (*again[:3], read, *again[4:]) == (method, target, path, told, minor, keep, body), data
        if number % 64 == 0:
            await asyncio.sleep(0)
    assert hits > 20


@pytest.mark.parametrize(
    "wrong",
    [
        b"Content-Length: +3", b"Content-Length: 3 ", b"Content-Length: 3,3", b"Content-Length:",
        b"Content-Length: 0x3",
        b"Content-Length: 3\r\nContent-Length: 3", b"Content-Length: 1234567890123456", b"Content-Length : 3",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"Content-Length: 3\nX: y", b"Content-Length: -3",
        b" Content-Length: 3", b"Content_Length: 3",
    ],
)  # fmt: skip
def test_other_ways_to_say_the_length_are_not_known(wrong: bytes) -> None:
    heads = cache.Heads()
    headers = [(b"host", b"x"), (b"content-length", b"3")]
    right = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
    assert heads.keep(right + b"abc", headers, "it")
    assert heads.find(right.replace(b"3", b"17", 1)) == ("it", len(right) + 1, 17)
    assert heads.find(right.replace(b"Content-Length: 3", wrong) + b"abc") is None


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", [(b"host", b"x y")]),
        (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", [(b"host", b"y")]),
        (b"\r\nPOST / HTTP/1.1\r\nHost: x\r\n\r\n", [(b"host", b"x")]),
        (b"POST / HTTP/1.1\r\nHost: x\n\r\n\r\n", [(b"host", b"x")]),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 5000 + b"\r\n\r\n",
            [(b"host", b"x"), (b"a", b"a" * 5000)],
        ),
    ],
)
def test_a_head_that_is_not_line_for_line_what_was_read_is_not_kept(data: bytes, headers: list[Any]) -> None:
    heads = cache.Heads()
    assert not heads.keep(data, headers, "it")
    assert heads.find(data) is None


def test_it_is_bounded() -> None:
    heads = cache.Heads(8)
    for number in range(100):
        data = b"POST /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number
        assert not heads.again(data)
        assert heads.again(data)
        assert heads.keep(data, [(b"host", b"x")], number)
        assert heads.find(data) == (number, len(data), -1)
        assert len(heads) <= 8


class Answer:
    """What httptools makes of one answer."""

    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.ended = 0
        self.begun = 0
        httptools.HttpResponseParser(self).feed_data(data)

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.ended += 1


ANSWER = b"HTTP/1.1 200 OK\r\nserver: x\r\ntransfer-encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nserver: x\r\ncontent-length: %d\r\n\r\n"


@settings(max_examples=400)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=5),
    cut=st.integers(0, 60) | st.none(),
    put=st.sampled_from(
        [b"", b"0\r\n\r\n", b"\r\n", b"0", b" ", b";a=b", b"F", b"\n", b"X: y\r\n", b"HTTP/1.1 200 OK"]
    ),
    at=st.integers(0, 200),
    upper=st.booleans(),
)
def test_answers_are_those_of_the_parser(
    pieces: list[bytes], cut: int | None, put: bytes, at: int, upper: bool
) -> None:
    heads = cache.Heads()
    assert heads.keep(ANSWER, [(b"server", b"x"), (b"transfer-encoding", b"chunked")], "chunked")
    assert heads.keep(SIZED % 3, [(b"server", b"x"), (b"content-length", b"3")], "sized")
    size = b"%X" if upper else b"%x"
    body = b"".join(size % len(piece) + b"\r\n" + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
    body = body[:at] + put + body[at:]
    whole = b"".join(pieces)
    for data, kind in ((ANSWER + body, "chunked"), (SIZED % len(whole) + whole + put, "sized")):
        data = data if cut is None else data[: len(data) - cut]
        found = heads.answer(data)
        if found is None:
            assert put or cut
            continue
        read = Answer(data)
        known, text, start, stop, head = found
        assert (known, text[start:stop]) == (kind, read.body)
        assert (read.begun, read.ended) == (1, int(head is None))
        if head is not None:
            # Then the parser could go on from there as if it had seen all.
            more = b"3\r\nend\r\n0\r\n\r\n"
            rest, full = Answer(head + more), Answer(data + more)
            assert (rest.body, rest.begun, rest.ended) == (b"end", 1, 1)
            assert (full.body, full.begun, full.ended) == (read.body + b"end", 1, 1)


class Upstream:
    """A connection to an engine, its pool, its transport and its reader."""

    def __init__(self, answers: Any, *, within: bool) -> None:
        self.answers = answers
        self.within = self.part if within else None
        """Which a reader may have, or not."""
        self.seen: list[Any] = []
        self.body = b""
        self.connection = UpstreamConnection(self, ("engine", 1))
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: None

    def is_closing(self) -> bool:
        return False

    def put(self, connection: Any, origin: Any) -> None:
        self.seen.append("pooled")

    def abort(self) -> None:
        self.seen.append("closed")

    def head(self, status: int, headers: list[Any]) -> None:
        self.seen += [status, list(headers)]

    def feed(self, data: bytes) -> None:
        self.body += data

    def end(self, last: bytes) -> None:
        self.body += last
        self.seen.append("end")

    def part(self, data: bytes, start: int, stop: int, last: bool) -> None:
        (self.end if last else self.feed)(data[start:stop])

    def fail(self, error: Exception) -> None:
        self.seen.append("failed")

    def answer(self, pieces: list[bytes]) -> tuple[list[Any], bytes]:
        """What all of them see of one answer, and its body."""
        self.seen, self.body = [], b""
        self.connection.ask((b"GET",), self)
        for piece in pieces:
            if piece:
                self.connection.data_received(piece)
        return self.seen, self.body


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.lists(st.binary(min_size=1, max_size=30), max_size=4),
            st.sampled_from(
                (b"0\r\n\r\n",) * 6 + (b"0;a\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"x", b"0\r\n\r\nHTTP")
            ),
            st.lists(st.integers(0, 200), max_size=3),
            st.integers(0, 3),
        ),
        min_size=3,
        max_size=6,
    ),
    st.booleans(),
)
def test_a_connection_hands_on_the_same_with_heads_it_knows(
    answers: list[tuple[list[bytes], bytes, list[int], int]], within: bool
) -> None:
    ours, theirs = Upstream(cache.Heads(), within=within), Upstream(None, within=False)
    whole = ANSWER + b"1\r\nx\r\n0\r\n\r\n"
    for _ in range(2):
        assert ours.answer([whole]) == theirs.answer([whole])
    assert len(ours.answers) == 1
    for chunks, last, cuts, at_once in answers:
        # So many chunks at once, the last one as well; 0: cut anywhere.
        framed = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
        rest = [*framed[1:], last]
        step = at_once or 1
        together = [b"".join(rest[at : at + step]) for at in range(0, len(rest), step)]
        pieces = [ANSWER + b"".join(framed[:1]), *together]
        if not at_once:
            data = b"".join(pieces)
            places = [0, *sorted(cuts), len(data)]
            pieces = [data[start:stop] for start, stop in itertools.pairwise(places)]
        found = ours.answer(pieces)
        assert found == theirs.answer(pieces)
        if "pooled" not in found[0] or "closed" in found[0]:
            break


@pytest.mark.parametrize("within", [False, True])
def test_an_answer_with_a_known_head_has_its_own_length(within: bool) -> None:
    ours, theirs = Upstream(cache.Heads(), within=within), Upstream(None, within=False)
    for size in (7, 7, 7, 70_000, 0, 12, 7):
        whole = SIZED % size + b"x" * size
        found = ours.answer([whole])
        assert found == theirs.answer([whole])
        assert (b"content-length", b"%d" % size) in found[0][1]
    assert len(ours.answers) == 1
