"""An engine that records the exact bytes it gets, and what two other parsers make of them."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import h11

from .corpus.case import Got

MARK = b"x-recorded"
"""The header of a recorded answer that says which request it answers."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """A request as h11 read it."""

    number: int
    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def got(self) -> Got:
        return Got(method=self.method, target=self.target, body=self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Bytes to answer a request with, piece by piece, and whether to close behind them."""

    pieces: Sequence[bytes]
    closes: bool


Answer = Callable[[Seen], bytes | Script]


def echo(seen: Seen) -> bytes:
    """A plain answer, marked with the number of the request."""
    body = json.dumps({"number": seen.number, "target": seen.target}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%b: %d\r\nContent-Length: %d\r\n\r\n"
    head %= (MARK, seen.number, len(body))
    return head if seen.method == "HEAD" else head + body


@dataclass(eq=False)
class Recorder:
    """A server; `answer` may be replaced at any time."""

    answer: Answer = echo
    seen: list[Seen] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What h11 could not read, and where the two parsers differ."""
    open: set[_Connection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _count: int = 0

    async def start(self) -> Recorder:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        return self

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def next_number(self) -> int:
        self._count += 1
        return self._count

    def hang_up(self) -> None:
        for connection in list(self.open):
            connection.hang_up()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.hang_up()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    """Reads with h11, and keeps each request's raw bytes for a second reading."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self._raw = bytearray()
        self._request: h11.Request | None = None
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport: Any = transport
        self._recorder.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._recorder.open.discard(self)

    def hang_up(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._raw += data
        try:
            self._parser.receive_data(data)
            self._read()
        except h11.RemoteProtocolError as error:
            self._fault(f"h11 does not read it: {error}")
            self._transport.abort()

    def _fault(self, what: str) -> None:
        self._recorder.faults.append(f"{what}: {bytes(self._raw[:2000])!r}")

    def _read(self) -> None:
        while not self._transport.is_closing():
            event = self._parser.next_event()
            if isinstance(event, h11.Request):
                self._request = event
                self._body = []
            elif isinstance(event, h11.Data):
                self._body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._whole()
            else:
                return

    def _whole(self) -> None:
        request = self._request
        assert request is not None
        # What the router asks for itself, such as /metrics, has no client's id.
        own = all(name != b"x-request-id" for name, _ in request.headers)
        seen = Seen(
            number=0 if own else self._recorder.next_number(),
            method=request.method.decode(),
            target=request.target.decode(),
            headers=list(request.headers),
            body=b"".join(self._body),
        )
        rest = len(self._parser.trailing_data[0])
        raw = bytes(self._raw[: len(self._raw) - rest])
        other = second_opinion(raw)
        if other != [seen.got]:
            self._fault(f"h11 reads {seen.got}, http.server {other}")
        del self._raw[: len(raw)]
        if own:
            answer: bytes | Script = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        else:
            self._recorder.seen.append(seen)
            answer = self._recorder.answer(seen)
        if isinstance(answer, Script):
            self._play(list(answer.pieces), answer.closes)
        else:
            self._transport.write(answer)
        # The parser must believe that we answered before it reads on.
        self._parser.send(h11.Response(status_code=204, headers=[]))
        self._parser.send(h11.EndOfMessage())
        if self._parser.our_state is h11.DONE:
            self._parser.start_next_cycle()
        else:
            self._transport.close()

    def _play(self, pieces: list[bytes], closes: bool) -> None:
        """The next piece, and later the others: what is written in one turn arrives as one."""
        if self._transport.is_closing():
            return
        if pieces:
            self._transport.write(pieces.pop(0))
        if pieces:
            asyncio.get_running_loop().call_soon(self._play, pieces, closes)
        elif closes:
            self._transport.close()


# The email package looks for a multipart body among the headers.
_OF_BODIES = frozenset(
    {"StartBoundaryNotFoundDefect", "MultipartInvariantViolationDefect", "NoBoundaryInMultipartDefect"}
)
# http.server stops at 100 headers; the router's limit is another one.
http.client._MAXHEADERS = 1000  # type: ignore[attr-defined]


class _Reader(BaseHTTPRequestHandler):
    """Python's own HTTP parser, without a socket."""

    def __init__(self, rfile: io.BytesIO) -> None:
        self.rfile = rfile  # type: ignore[assignment]
        self.client_address = ("", 0)
        self.refusal: str | None = None

    def read_request(self) -> bool:
        self.raw_requestline = self.rfile.readline(65537)
        return bool(self.raw_requestline) and self.parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.refusal = f"{code} {message}"

    def handle_expect_100(self) -> bool:
        return True


def second_opinion(raw: bytes) -> list[Got] | str:
    """The requests in `raw` as http.server reads them; a text where it does not."""
    stream = io.BytesIO(raw)
    found = []
    while stream.tell() < len(raw):
        reader = _Reader(stream)
        if not reader.read_request():
            return reader.refusal or "nothing"
        headers = reader.headers
        defects = [defect for defect in headers.defects if type(defect).__name__ not in _OF_BODIES]
        if defects or "transfer-encoding" in headers:
            return f"odd headers: {defects}"
        lengths = headers.get_all("content-length", ["0"])
        if len(lengths) != 1:
            return f"lengths {lengths}"
        length = int(lengths[0])
        body = stream.read(length)
        if len(body) != length:
            return "a body that is too short"
        found.append(Got(method=reader.command, target=reader.path, body=body))
    return found
