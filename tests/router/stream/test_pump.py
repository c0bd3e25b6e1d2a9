"""The compiled pump carries what `GeneratedStream` would write, byte for byte, and keeps the same account."""

from __future__ import annotations

import itertools
import json
import logging
import random
import socket
import sys
from collections.abc import Iterator

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.router.stream import pumping
from hpcserve.router.stream.asked import Asked
from hpcserve.router.stream.generated import GeneratedStream

pump = pumping.compiled()
assert pump is not None, "`make venv` compiles it, with a C compiler and Python's headers"

HEAD = 'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'


def token(text: str, ids: list[int] | None, *, reason: str = "null", chat: bool = True) -> bytes:
    written = json.dumps(text)
    delta = f'"delta":{{"content":{written}}}' if chat else f'"text":{written}'
    named = "" if ids is None else f',"token_ids":{json.dumps(ids, separators=(",", ":"))}'
    return f'{HEAD}{delta},"logprobs":null,"finish_reason":{reason}{named}}}]}}\n\n'.encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Body:
    """What a client reads out of chunks."""

    def __init__(self, chunks: bytes) -> None:
        self.data = b""
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)

    def on_body(self, data: bytes) -> None:
        self.data += data


class Way:
    """A line between two socket pairs, and the stream behind it."""

    def __init__(self, *, wants_ids: bool, chat: bool) -> None:
        self.engine, self.source = socket.socketpair()
        self.sink, self.client = socket.socketpair()
        self.client.setblocking(False)
        self.stream = GeneratedStream(lambda data: None, Asked(wants_ids=wants_ids), chat=chat)
        self.stream.introduced = True
        self.left: tuple[bytes, bytes] | None = None
        self.pump = pump.Pump()
        mark, close = self.stream.marks
        self.line = pump.Line(
            self.source.fileno(), self.sink.fileno(), self._back, mark=mark, close=close, keep_ids=wants_ids
        )
        self.pump.add(self.line)

    def _back(self, unread: bytes, unsent: bytes) -> None:
        self.left = unread, unsent

    def read(self) -> bytes:
        found = b""
        while True:
            try:
                found += self.client.recv(1 << 20)
            except BlockingIOError:
                return found

    def close(self) -> None:
        for sock in (self.engine, self.source, self.sink, self.client):
            sock.close()


@pytest.fixture(params=[(False, True), (True, True), (False, False)], ids=["chat", "keeps-ids", "text"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    wants_ids, chat = request.param
    made = Way(wants_ids=wants_ids, chat=chat)
    made.chat = chat  # type: ignore[attr-defined]
    yield made
    made.close()


def account(stream: GeneratedStream) -> tuple[object, ...]:
    return bytes(stream.ids), bytes(stream.text), stream.reached, stream.single, stream.events


def reference(events: list[bytes], *, wants_ids: bool, chat: bool) -> tuple[bytes, GeneratedStream]:
    out: list[bytes] = []
    stream = GeneratedStream(out.append, Asked(wants_ids=wants_ids), chat=chat)
    stream.introduced = True
    for event in events:
        stream.feed(event)
    return b"".join(out), stream


ODD = ["", '"', "\\", '"},"logprobs":', '"token_ids":[1', "\n\n", "é", "🙂"]
TEXT = st.text(max_size=12) | st.sampled_from(ODD)
IDS = st.none() | st.lists(st.integers(0, 200_000), max_size=4)


@given(
    events=st.lists(st.tuples(TEXT, IDS, st.sampled_from(["null", "null", "null", '"stop"'])), max_size=12),
    wants_ids=st.booleans(),
    chat=st.booleans(),
    cuts=st.lists(st.integers(0, 4000), max_size=3),
    seed=st.integers(),
)
def test_any_stream_comes_out_as_without_the_pump(events, wants_ids, chat, cuts, seed) -> None:  # type: ignore[no-untyped-def]
    made = [token(text, ids, reason=reason, chat=chat) for text, ids, reason in events]
    random.Random(seed).shuffle(made)
    wire = b"".join(map(chunk, made))
    way = Way(wants_ids=wants_ids, chat=chat)
    try:
        places = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
        unread = b""
        for start, end in itertools.pairwise(places):
            if way.left is None:
                way.engine.sendall(wire[start:end])
                way.pump.run()
                if way.left is not None:
                    unread, unsent = way.left
                    assert unsent == b""
            else:
                unread += wire[start:end]
        carried = Body(way.read()).data
        way.line.settle(way.stream)
        # What the pump did not carry goes the usual way, as chunks whole.
        rest: list[bytes] = []
        way.stream.write_to(rest.append)
        for event in events_of(unread):
            way.stream.feed(event)
        expected, stream = reference(made, wants_ids=wants_ids, chat=chat)
        assert carried + b"".join(rest) == expected
        assert account(way.stream) == account(stream)
    finally:
        way.close()


def events_of(chunks: bytes) -> list[bytes]:
    found = []
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        chunks = rest[int(size, 16) + 2 :]
    return found


def test_usual_events_are_carried_without_python(way: Way) -> None:
    chat = way.chat  # type: ignore[attr-defined]
    wire = b"".join(chunk(token(f" w{n}", [n, n + 1], chat=chat)) for n in range(200))
    way.engine.sendall(wire)
    way.pump.run()
    assert way.left is None
    assert way.line.pieces >= 1
    assert Body(way.read()).data.count(b"data: {") == 200
    way.line.settle(way.stream)
    assert way.stream.events == 200
    assert way.stream.tokens == 400
    assert way.line.pieces == 0


def test_a_client_that_does_not_read_gets_the_rest_another_way(way: Way) -> None:
    chat = way.chat  # type: ignore[attr-defined]
    way.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = b""
    while way.left is None:
        one = b"".join(chunk(token("word" * 20, [7], chat=chat)) for _ in range(20))
        way.engine.sendall(one)
        sent += one
        way.pump.run()
        assert len(sent) < 1 << 24
    unread, unsent = way.left
    assert unread == b""
    assert unsent
    assert Body(way.read() + unsent).data.count(b"data: {") == sent.count(b"data: {")
    assert len(way.pump) == 0


def test_the_end_of_the_engines_connection_is_left_to_the_usual_way(way: Way) -> None:
    way.engine.close()
    way.pump.run()
    assert way.left == (b"", b"")
    assert len(way.pump) == 0


def test_a_removed_line_is_left_alone(way: Way) -> None:
    chat = way.chat  # type: ignore[attr-defined]
    way.pump.remove(way.line)
    way.engine.sendall(chunk(token("a", [1], chat=chat)))
    way.pump.run()
    assert way.left is None
    assert way.read() == b""
    assert way.source.recv(4096)


def test_a_pump_of_another_source_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpcserve.http.compiled._told", set())
    monkeypatch.setattr(pump, "SOURCE", "0" * 64)
    with caplog.at_level(logging.WARNING):
        assert pumping.compiled() is None
    assert "compiled from another pump.pyx" in caplog.text


def test_without_a_compiled_pump_the_router_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpcserve.http.compiled._told", set())
    monkeypatch.setitem(sys.modules, "hpcserve.router.stream.pump", None)
    with caplog.at_level(logging.WARNING):
        assert pumping.compiled() is None
        assert pumping.compiled() is None
    assert len(caplog.records) == 1
    assert "hpcserve.router.stream.pump was not compiled" in caplog.text
