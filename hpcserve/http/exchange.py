"""One request and its answer, as a handler sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Protocol

from .errors import ClientGone, Header, HttpError

_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b" % (s.value, s.phrase.encode()) for s in HTTPStatus}
_UNREAD_HIGH = 256 * 1024
"""Bytes of a body nobody asked for yet that may pile up before reading from the client stops."""


_HOLD_MAX = 16 * 1024
"""Pieces above this size gain nothing from waiting for others."""


class Owner(Protocol):
    """Answers an exchange by callbacks, without a task."""

    def client_gone(self) -> None:
        """The client has left, before the answer was finished."""
        ...

    def flow(self, paused: bool) -> None:
        """The client's buffer passed its high mark (`paused`), or its low mark."""
        ...


Handler = Callable[["Exchange"], Awaitable[None]]


class Wire(Protocol):
    """The connection below an exchange."""

    @property
    def congested(self) -> bool: ...
    def send(self, data: bytes) -> None: ...
    def want_body(self, exchange: Exchange) -> None: ...
    def stop_body(self) -> None: ...
    def answered(self, exchange: Exchange, keep: bool) -> None: ...
    async def drain(self) -> None: ...
    def abort(self) -> None: ...
    def run(self, exchange: Exchange, handler: Handler) -> None: ...
    def lend(self) -> int: ...


class Exchange:
    """A request being answered. Handlers read `body()`, then `respond()`, or `start` … `write` … `finish`.

    Header names are lower-case. After the client has gone, writes are dropped and `closed` is done.
    """

    __slots__ = (
        "_bodyless",
        "_chunked",
        "_chunks",
        "_closed",
        "_complete",
        "_continue",
        "_declared",
        "_fault",
        "_flow",
        "_gone",
        "_held",
        "_keep",
        "_limit",
        "_minor",
        "_named",
        "_piled",
        "_remaining",
        "_send",
        "_size",
        "_streams",
        "_waiter",
        "_wire",
        "finished",
        "headers",
        "method",
        "owner",
        "path",
        "peer",
        "query",
        "started",
        "status",
        "target",
    )  # fmt: skip

    def __init__(
        self,
        wire: Wire,
        *,
        method: str,
        target: str,
        path: str,
        headers: list[Header],
        peer: str,
        minor: int,
        keep: bool,
        declared: int | None,
        expects_continue: bool,
        body: bytes | memoryview | None = None,
    ) -> None:
        """`body`: all of it came with the head."""
        self.method = method
        self.target = target
        self.path = path
        self.query = target.partition("?")[2]
        self.headers = headers
        self._named: dict[bytes, bytes] | None = None
        """The first header of each name."""
        self.peer = peer
        self.started = False
        self.finished = False
        self.status = 0
        self.owner: Owner | None = None
        """Who answers it by callbacks; None: a task does."""
        self._wire = wire
        self._send = wire.send
        self._minor = minor
        self._closed: asyncio.Future[None] | None = None
        self._gone = False
        self._held: list[bytes] | None = None
        """Bytes that go out together, at the end of this turn of the event loop at the latest."""
        self._keep = keep
        self._declared = declared
        self._continue = expects_continue
        self._chunks: list[bytes | memoryview] = [] if body is None else [body]
        self._size = 0 if body is None else len(body)
        self._streams = False
        """The body is read in pieces."""
        self._piled = 0
        """Bytes in `_chunks`, where it is."""
        self._limit: int | None = None
        self._complete = body is not None
        self._fault: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._chunked = False
        self._bodyless = False
        self._remaining: int | None = None
        self._flow: tuple[Callable[[], None], Callable[[], None]] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first header called `name` (lower-case), or None."""
        named = self._named
        if named is None:
            named = self._named = dict(reversed(self.headers))
        return named.get(name)

    # Reading the request.

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises HttpError 413 above `limit` bytes, 408 when the client stalls,
        400 when its framing is broken, and ClientGone."""
        self._limit = limit
        if self._declared is not None and self._declared > limit:
            raise self._too_large()
        while not self._complete:
            if self._fault is not None:
                raise self._fault
            if self._size > limit:
                raise self._too_large()
            await self._more()
        if self._size > limit:
            raise self._too_large()
        return self.whole()

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes, some hundred KiB of it in memory. Raises as body() does."""
        self._limit = limit
        self._streams = True
        self._piled = self._size
        if self._declared is not None and self._declared > limit:
            raise self._too_large()
        while True:
            if self._fault is not None:
                raise self._fault
            if self._size > limit:
                raise self._too_large()
            if self._chunks:
                piece = self.whole()
                self._chunks = []
                self._piled = 0
                yield piece
            elif self._complete:
                return
            else:
                await self._more()

    async def _more(self) -> None:
        """Wait until more of the body is here."""
        if self._continue and not self._size and not self.started:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._continue = False
        self._waiter = asyncio.get_running_loop().create_future()
        self._wire.want_body(self)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def whole(self) -> bytes:
        """The whole body, once `request_complete`."""
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 and type(chunks[0]) is bytes else b"".join(chunks)
        self._chunks = [body]
        return body

    def _too_large(self) -> HttpError:
        self._chunks.clear()
        return HttpError(413, f"the request body is larger than {self._limit} bytes")

    def feed(self, data: bytes | memoryview) -> None:
        """A piece of the body arrived (called by the connection)."""
        if self.finished or self._fault is not None:
            return
        self._size += len(data)
        self._chunks.append(data)
        if self._streams:
            self._piled += len(data)
            if self._piled > _UNREAD_HIGH:
                self._wire.stop_body()
            self._wake()
        elif self._waiter is None:
            if self._size > _UNREAD_HIGH:
                self._wire.stop_body()
        elif self._limit is not None and self._size > self._limit:
            self._wire.stop_body()
            self._wake()

    def complete(self) -> None:
        """The request is whole (called by the connection)."""
        self._complete = True
        self._wake()

    @property
    def received(self) -> int:
        """Bytes of the body that came so far."""
        return self._size

    @property
    def awaits_body(self) -> bool:
        """The handler waits for more of the body."""
        return self._waiter is not None

    @property
    def congested(self) -> bool:
        """The client reads too slowly at this moment."""
        return self._wire.congested

    @property
    def gone(self) -> bool:
        """The client has left."""
        return self._gone

    @property
    def request_complete(self) -> bool:
        return self._complete

    def fail(self, fault: Exception) -> None:
        """The body can't be read any further (called by the connection)."""
        self._fault = fault
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lost(self) -> None:
        """The client has gone (called by the connection)."""
        if not self._complete:
            self.fail(ClientGone())
        self._gone = True
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)
        owner, self.owner = self.owner, None
        if owner is not None and not self.finished:
            owner.client_gone()

    def hand_over(self, handler: Handler) -> None:
        """Let a task with `handler` answer. Until it takes `owner` away, that one hears of the end."""
        self._wire.run(self, handler)

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done once the client has gone."""
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            if self._gone:
                self._closed.set_result(None)
        return self._closed

    # Writing the response.

    def start(self, status: int, headers: Sequence[Header], *, length: int | None = None) -> None:
        """Send the head. Without `length` the body is chunked, or ends with the connection for HTTP/1.0."""
        if self.started:
            raise RuntimeError("the response was started twice")
        self.started = True
        self.status = status
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown" % status]
        lines += map(b": ".join, headers)
        no_body = status == 204 or status == 304
        self._bodyless = no_body or self.method == "HEAD"
        if length is not None:
            if not no_body:
                lines.append(b"content-length: %d" % length)
                self._remaining = length
        elif not no_body:
            if self._minor >= 1:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked")
            else:
                self._keep = False
        # An unread rest of the request can't be told from the next one, so the connection must end.
        self._keep = self._keep and self._complete
        if not self._keep:
            lines.append(b"connection: close")
        elif self._minor == 0:
            lines.append(b"connection: keep-alive")
        lines.append(b"\r\n")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a response header has a line break in it")
        self.hold()
        self._put(head)

    def write(self, data: bytes) -> None:
        """Send a piece of the body now."""
        if self._bodyless or not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
            if self._held is None:
                self._send(data)
            else:
                self._put(data)
            return
        if self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining < 0:
                self.abort()
                raise RuntimeError("the response is longer than the length it announced")
        self._put(data)

    def cork(self) -> None:
        """Hold back what is written until `uncork()`, to send it with one system call."""
        if self._held is None:
            self._held = []

    def uncork(self) -> None:
        """Send what was held back."""
        self._flush()

    def hold(self) -> None:
        """What is written until the event loop's next turn goes out at once, with one system call."""
        if self._held is None:
            self._held = []
            asyncio.get_running_loop().call_soon(self._flush)

    def _put(self, data: bytes) -> None:
        if self._held is None:
            self._send(data)
        else:
            self._held.append(data)
            if len(data) > _HOLD_MAX:
                self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held:
            self._send(held[0] if len(held) == 1 else b"".join(held))

    def lend(self) -> int:
        """The socket, for who sends chunks on it until something is written here again; -1 where that can't
        be, as with TLS, or while bytes wait to be sent."""
        if not self._chunked or self._bodyless or self._held is not None:
            return -1
        return self._wire.lend()

    def send_framed(self, chunks: bytes) -> None:
        """Send what is in chunks already, or the rest of it."""
        self._send(chunks)

    def finish(self, *, close: bool = False) -> None:
        """End the response; with `close` the connection ends as well."""
        if self.finished:
            return
        if self._remaining and not self._bodyless:
            self.abort()
            return
        self.finished = True
        self.owner = None
        if self._chunked and not self._bodyless:
            self._put(b"0\r\n\r\n")
        self._flush()
        self._chunks.clear()
        self._wire.answered(self, self._keep and self._complete and not close)

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: bytes = b"application/json",
        headers: Sequence[Header] = (),
    ) -> None:
        """Send a whole response."""
        self.start(status, [(b"content-type", content_type), *headers], length=len(body))
        self.write(body)
        self.finish()

    def fail_with(self, error: HttpError) -> None:
        """Answer with an error; the response must not have been started."""
        self.respond(error.status, error.body(), headers=error.headers)

    async def drain(self) -> None:
        """Wait until the client has read enough that more may be written."""
        self._flush()
        await self._wire.drain()

    def on_flow(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Have `pause` called when the client reads too slowly, `resume` when it caught up."""
        self._flow = (pause, resume)
        if self._wire.congested:
            pause()

    def flow(self, paused: bool) -> None:
        """The client's buffer passed its high or low mark (called by the connection)."""
        if self.owner is not None:
            self.owner.flow(paused)
        elif self._flow is not None:
            self._flow[0 if paused else 1]()

    def abort(self) -> None:
        """Cut the connection: the only honest end of a response that can't be completed."""
        self.finished = True
        self.owner = None
        self._held = None
        self._wire.abort()
