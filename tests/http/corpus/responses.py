"""Answers of engines: good ones, and those that end elsewhere than they say or never.

`case-000000.` stands for a mark of the request that is answered: no answer can reach another client unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKEN = b"case-000000."
JSON = b'{"id":"case-000000.","choices":[]}'
EVENT = b'data: {"id":"case-000000.","choices":[{"index":0,"text":"a"}]}\n\n'
DONE = b"data: [DONE]\n\n"
_OK = b"HTTP/1.1 200 OK\r\n"
_JSON = b"Content-Type: application/json\r\n"
_SSE = b"Content-Type: text/event-stream\r\n"
_LENGTH = b"Content-Length: %d\r\n" % len(JSON)
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Bytes an engine writes, and the body a client may take for whole: None if it must not."""

    data: bytes
    body: bytes | None = None
    status: int = 200
    closes: bool = False
    """The engine closes the connection behind it."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _good(*lines: bytes, body: bytes = JSON, framed: bytes | None = None, **more: bool | int) -> Answer:
    return Answer(data=b"".join(lines) + b"\r\n" + (body if framed is None else framed), body=body, **more)  # type: ignore[arg-type]


def _bad(*lines: bytes, closes: bool = False) -> Answer:
    return Answer(data=b"".join(lines), closes=closes)


_STREAM = _OK + _SSE + _CHUNKED + b"\r\n"
_EVENTS = EVENT * 3 + DONE

GOOD: dict[str, Answer] = {
    "a length": _good(_OK, _JSON, _LENGTH),
    "a length of zero": _good(_OK, _JSON, b"Content-Length: 0\r\n", body=b""),
    "chunks": _good(_OK, _JSON, _CHUNKED, framed=chunk(JSON[:5]) + chunk(JSON[5:]) + _END),
    "chunks with extensions and trailers": _good(
        _OK, _JSON, _CHUNKED, framed=b"%x;a=b\r\n%b\r\n0;c\r\nX: y\r\n\r\n" % (len(JSON), JSON)
    ),
    "a body until the end": _good(_OK, _JSON, closes=True),
    "a stream": _good(_OK, _SSE, _CHUNKED, body=_EVENTS, framed=chunk(EVENT) * 3 + chunk(DONE) + _END),
    "a stream until the end": _good(_OK, _SSE, body=_EVENTS, closes=True),
    "a stream with a length": _good(_OK, _SSE, b"Content-Length: %d\r\n" % len(_EVENTS), body=_EVENTS),
    "a stream in odd chunks": _good(
        _OK,
        _SSE,
        _CHUNKED,
        body=_EVENTS,
        framed=b"".join(chunk(_EVENTS[at : at + 7]) for at in range(0, len(_EVENTS), 7)) + _END,
    ),
    "a refusal": _good(b"HTTP/1.1 422 Unprocessable\r\n", _JSON, _LENGTH, status=422),
    "a refusal without a phrase": _good(b"HTTP/1.1 422 \r\n", _JSON, _LENGTH, status=422),
    "no content": _good(b"HTTP/1.1 204 No Content\r\n", body=b"", status=204),
    "100 first": _good(b"HTTP/1.1 100 Continue\r\n\r\n", _OK, _JSON, _LENGTH),
    "Connection: close": _good(_OK, _JSON, _LENGTH, b"Connection: close\r\n", closes=True),
    "HTTP/1.0": _good(b"HTTP/1.0 200 OK\r\n", _JSON, _LENGTH, closes=True),
}

BAD: dict[str, Answer] = {
    "nothing": _bad(b"", closes=True),
    "no HTTP": _bad(b"hello\r\n\r\n", closes=True),
    "half a head": _bad(_OK + _JSON, closes=True),
    "half a status line": _bad(b"HTTP/1.1 20", closes=True),
    "a status of two digits": _bad(b"HTTP/1.1 20 OK\r\n" + _LENGTH + b"\r\n" + JSON),
    "a status of letters": _bad(b"HTTP/1.1 abc OK\r\n" + _LENGTH + b"\r\n" + JSON),
    "HTTP/2": _bad(b"HTTP/2.0 200 OK\r\n" + _LENGTH + b"\r\n" + JSON),
    "HTTP/0.9": _bad(JSON, closes=True),
    "a length, then chunks": _bad(_OK + _JSON + _LENGTH + _CHUNKED + b"\r\n" + _END),
    "chunks, then a length": _bad(_OK + _JSON + _CHUNKED + _LENGTH + b"\r\n" + _END),
    "two lengths": _bad(_OK + _JSON + b"Content-Length: 1\r\n" + _LENGTH + b"\r\n" + JSON),
    "a list of lengths": _bad(_OK + _JSON + b"Content-Length: 36, 36\r\n\r\n" + JSON),
    "a signed length": _bad(_OK + _JSON + b"Content-Length: +36\r\n\r\n" + JSON),
    "a negative length": _bad(_OK + _JSON + b"Content-Length: -1\r\n\r\n" + JSON),
    "a length beyond 64 bits": _bad(_OK + _JSON + b"Content-Length: 18446744073709551652\r\n\r\n" + JSON),
    "a bare LF in the head": _bad(_OK + b"X: y\n" + _LENGTH + b"\r\n" + JSON),
    "bare LFs only": _bad((_OK + _LENGTH + b"\r\n").replace(b"\r\n", b"\n") + JSON),
    "a bare CR in the head": _bad(_OK + b"X: y\r" + _LENGTH + b"\r\n" + JSON),
    "a folded header": _bad(_OK + b"X: y\r\n z\r\n" + _LENGTH + b"\r\n" + JSON),
    "a space before a colon": _bad(_OK + b"Content-Length : 36\r\n\r\n" + JSON, closes=True),
    "a NUL in the head": _bad(_OK + b"X: \0\r\n" + _LENGTH + b"\r\n" + JSON),
    "a head without end": _bad(_OK + b"X: " + b"y" * 300_000),
    "headers without end": _bad(_OK + b"X: y\r\n" * 50_000),
    "1xx without end": _bad(b"HTTP/1.1 102 Processing\r\n\r\n" * 5_000),
    "a switch of protocols": _bad(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    ),
    "a length that is too long": _bad(_OK + _JSON + b"Content-Length: 99\r\n\r\n" + JSON, closes=True),
    "chunks without an end": _bad(_OK + _JSON + _CHUNKED + b"\r\n" + chunk(JSON), closes=True),
    "half a chunk": _bad(_OK + _JSON + _CHUNKED + b"\r\n" + chunk(JSON)[:20], closes=True),
    "half a last chunk": _bad(_OK + _JSON + _CHUNKED + b"\r\n" + chunk(JSON) + b"0\r\n", closes=True),
    "a chunk size that is no number": _bad(_OK + _JSON + _CHUNKED + b"\r\nzz\r\nabc\r\n"),
    "a chunk that is longer than it says": _bad(_OK + _JSON + _CHUNKED + b"\r\n3\r\nabcdef\r\n" + _END),
    "a chunk line without end": _bad(_OK + _JSON + _CHUNKED + b"\r\n1;" + b"a" * 3_000_000, closes=True),
    "a chunk size beyond 64 bits": _bad(_OK + _JSON + _CHUNKED + b"\r\nfffffffffffffffff\r\nabc"),
    "a coding we did not ask for": _bad(_OK + _JSON + b"Transfer-Encoding: gzip\r\n\r\nabc", closes=True),
    "a stream without its end": _bad(_STREAM + chunk(EVENT) * 2, closes=True),
    "a stream that ends in an event": _bad(_STREAM + chunk(EVENT) + chunk(EVENT[:20]), closes=True),
    "a stream with a broken chunk": _bad(_STREAM + chunk(EVENT) + b"zz\r\n", closes=True),
    "a stream with a bare LF": _bad(_STREAM + chunk(EVENT) + b"3\nabc\r\n", closes=True),
}

_SECOND = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n" + b'{"id":"smuggled."}'
)
AND_MORE: dict[str, Answer] = {
    "a second answer": Answer(data=GOOD["a length"].data + _SECOND, body=JSON),
    "a second answer behind chunks": Answer(data=GOOD["chunks"].data + _SECOND, body=JSON),
    "a second answer behind a stream": Answer(data=GOOD["a stream"].data + _SECOND, body=_EVENTS),
    "noise": Answer(data=GOOD["a length"].data + b"noise", body=JSON),
    "an empty line": Answer(data=GOOD["a length"].data + b"\r\n", body=JSON),
    "a body behind 204": Answer(data=GOOD["no content"].data + JSON, body=b"", status=204),
    "a body behind a length of zero": Answer(data=GOOD["a length of zero"].data + JSON, body=b""),
}
"""Whole answers and something behind them, which no client may ever see."""
