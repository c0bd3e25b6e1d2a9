"""A connection to a server: one request at a time, its answer as raw body bytes to a Reader."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol, cast

import httptools

from .errors import Header, UpstreamError, UpstreamFault
from .heads import Headers, Heads
from .host import at_once
from .response import Reader, UpstreamResponse

_HEAD_LIMIT = 64 * 1024
_WRITE_HIGH = 256 * 1024

Origin = tuple[str, int]


class ConnectionOwner(Protocol):
    """The pool, as a connection sees it."""

    answers: Heads | None
    """Heads of answers that were parsed before; None: each one is parsed."""

    def opened(self, connection: UpstreamConnection) -> None: ...
    def put(self, connection: UpstreamConnection, origin: Origin) -> None: ...
    def forget(self, connection: UpstreamConnection, origin: Origin) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to one origin; it carries one exchange at a time."""

    def __init__(self, pool: ConnectionOwner, origin: Origin) -> None:
        self._pool = pool
        self._answers = pool.answers
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._reader: Reader | None = None
        self._answered = False
        """The head of the answer has come."""
        self._is_head_request = False
        self._status = 0
        self._bounded = False
        self._keep = False
        self._complete = False
        self._paused = False
        self._writable: asyncio.Future[None] | None = None
        """Done once more of a body may be sent; None: it may."""
        self._chunked = self._inside_chunk = False
        self._ends_line = False
        """The last bytes that came were the end of a line."""
        self._unparsed = b""
        """The head of the answer that is coming, where only its bytes were looked at."""
        self.heard = False
        """A byte of the current answer has arrived."""
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        at_once(transport)
        self._pool.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self, self._origin)
        self._over("reset", f"connection closed: {error}" if error else "connection closed before the end")
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def eof_received(self) -> bool:
        if self._answered and not self._bounded and self._reader is not None:
            # The end of the connection is this body's end.
            self._keep = False
            self._finish(b"")
        return False

    def data_received(self, data: bytes) -> None:
        if self._reader is None:
            # Nobody asked: such a connection can't be trusted with the next request.
            self.abort()
            return
        fresh = not self.heard and self._answers is not None and not self._is_head_request
        self.heard = True
        if fresh and self._known(data):
            return
        if self._unparsed and self._more(data):
            return
        unparsed, self._unparsed = self._unparsed, b""
        try:
            if unparsed:
                # Between two chunks the parser is where it is after the head.
                self._parser.feed_data(unparsed)
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break("protocol", f"not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade:
            self._break("protocol", "it wants to switch to another protocol")
            return
        if not self._answered:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_LIMIT:
                self._break("protocol", "the response head is too large")
            return
        if fresh:
            self._learn(data)
        pieces = self._pieces
        piece = b""
        if pieces:
            piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
        if self._complete:
            self._finish(piece)
        elif piece and self._reader is not None:
            self._ends_line = data.endswith(b"\r\n")
            self._reader.feed(piece)

    # Answers whose heads came before

    def _known(self, data: bytes) -> bool:
        """Does an answer begin here whose head is known? Then its reader has what there is of it."""
        answers, reader = self._answers, self._reader
        if answers is None or reader is None:
            return False
        found = answers.answer(data)
        if found is None:
            return False
        (status, headers), body, start, stop, head = found
        self._keep = self._answered = True
        self._complete = last = head is None
        reader.head(status, headers.of_length(stop - start))
        if not last:
            # The parser does not have to see it, unless chunks of another form come.
            self._unparsed = head or b""
            self._status = status
            self._bounded = self._chunked = self._ends_line = True
        self._hand_on(reader, body, start, stop, last=last)
        return True

    def _more(self, data: bytes) -> bool:
        """Does an answer go on with usual chunks of which the parser has seen nothing? As `_known()`."""
        answers, reader = self._answers, self._reader
        if answers is None or reader is None:
            return False
        found = answers.rest(data)
        if found is None:
            return False
        body, start, stop, self._complete = found
        self._hand_on(reader, body, start, stop, last=self._complete)
        return True

    def _hand_on(self, reader: Reader, body: bytes, start: int, stop: int, *, last: bool) -> None:
        within = getattr(reader, "within", None)
        if within is None and last:
            self._finish(body[start:stop])
        elif within is None:
            reader.feed(body[start:stop])
        else:
            if last:
                self._reader = None
                self._finish(b"")
            # What is compiled reads a body where it is.
            within(body, start, stop, last)

    def _learn(self, data: bytes) -> None:
        """The parser has read the head that `data` begins with."""
        answers = self._answers
        if answers is None or not self._keep or not self._bounded or self._status in (204, 304):
            return
        # And no 1xx before it.
        if data.startswith(b"HTTP/1.1 %d" % self._status) and answers.again(data):
            # A copy: trailers are still to come into the parser's own list.
            headers = Headers(self._headers)
            answers.keep(data, headers, (self._status, headers))

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._complete or self._answered or self._reader is None:
            return
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            return
        if parser.get_http_version() not in ("1.1", "1.0"):
            self._break("protocol", "the answer is not HTTP/1.1")
            return
        codings = 0
        bounded = self._is_head_request or status == 204 or status == 304
        for name, value in self._headers:
            if name == b"content-length":
                bounded = True
            elif name == b"transfer-encoding":
                codings += 1
                bounded = True
                if codings > 1 or value.strip(b" \t").lower() != b"chunked":
                    # The parser would take the body for one without framing, and hand on the frames as text.
                    self._break("protocol", "the answer's Transfer-Encoding is not chunked alone")
                    return
        self._bounded, self._chunked = bounded, codings == 1
        self._keep = parser.should_keep_alive() and not self._is_head_request
        self._status = status
        self._answered = True
        self._complete = self._is_head_request
        self._reader.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if not self._complete:
            self._pieces.append(data)

    def on_chunk_header(self) -> None:
        self._inside_chunk = True

    def on_chunk_complete(self) -> None:
        self._inside_chunk = False

    def on_message_complete(self) -> None:
        if self._answered:
            self._complete = True

    # Reading for somebody else

    def lend(self) -> int:
        """The socket, for who reads chunks from it until `take_back()`; -1 where none begins next."""
        transport = self._transport
        between = self._chunked and self._ends_line and not self._inside_chunk
        if transport is None or not between or self._paused or not self.usable:
            return -1
        self.pause()
        raw: socket.socket = transport.get_extra_info("socket")
        return raw.fileno()

    def take_back(self, unread: bytes) -> None:
        """Go on with what was received and not read."""
        self.resume()
        if unread:
            self.data_received(unread)

    # The exchange

    def ask(self, request: Sequence[bytes], reader: Reader, *, is_head: bool = False) -> None:
        """Send a request; `reader` takes the answer. `usable` must be true."""
        assert self._transport is not None
        self._reader = reader
        self._is_head_request = is_head
        self._answered = self._complete = self._inside_chunk = False
        self._head_bytes = 0
        self._unparsed = b""
        self.heard = False
        if len(request) == 1:
            self._transport.write(request[0])
        else:
            self._transport.writelines(request)

    async def send(self, data: bytes) -> None:
        """Send more of the request, as fast as the other side takes it. Dropped when that one is gone."""
        if self._transport is not None:
            self._transport.write(data)
        if self._writable is not None:
            await asyncio.shield(self._writable)

    @property
    def reader(self) -> Reader | None:
        """Who takes the answer that is coming."""
        return self._reader

    def hand_over(self, reader: Reader) -> None:
        """Let `reader` take the rest of the answer that is coming."""
        self._reader = reader

    async def exchange(self, request: Sequence[bytes], *, is_head: bool) -> UpstreamResponse:
        """Send a request and wait for the head of its answer. Raises UpstreamError."""
        if not self.usable:
            raise UpstreamError("reset", "connection closed while idle")
        response = UpstreamResponse(self)
        self.ask(request, response, is_head=is_head)
        await response.arrival()
        return response

    def _finish(self, last: bytes) -> None:
        reader, self._reader = self._reader, None
        if self._keep and self.usable:
            if self._paused:
                self.resume()
            self._pool.put(self, self._origin)
        else:
            self.abort()
        if reader is not None:
            reader.end(last)

    def _break(self, fault: UpstreamFault, message: str) -> None:
        self._over(fault, message)
        self.abort()

    def _over(self, fault: UpstreamFault, message: str) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.fail(UpstreamError(fault, message))

    def pause(self) -> None:
        if not self._paused and self.usable and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.usable and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close it now; a reader that still waits is told."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()
