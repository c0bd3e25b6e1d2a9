"""A client's connection to a server: parsing, order of answers, deadlines, flow control."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections import deque
from typing import NoReturn, cast

import httptools

from .errors import ClientGone, Header, HttpError
from .exchange import Exchange, Handler
from .head import head_too_large, malformed, read_head
from .host import Host, at_once

log = logging.getLogger(__name__)

_HEADERS_MAX = 256
_PIPELINED_MAX = 64
_READ_AHEAD = 8
"""Pipelined requests that may wait before reading stops: while it does, a client that leaves is not seen."""
_WRITE_HIGH = 64 * 1024
_FRAMING_FREE = 512 * 1024
_FRAMING_RATIO = 16
"""A request with a body may have this many bytes of framing for each byte of it, and those above for free."""
_LINGER = 2.0
_INF = math.inf


class Connection(asyncio.Protocol):
    """One TCP connection. Requests are answered in order, one at a time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._url = b""
        self._headers: list[Header] = []
        self._in_head = self._muted = self._parses = False
        self._head_bytes = self._fed = 0
        self._arriving = 0
        """Bytes of the piece that is being parsed."""
        self._framing: Header | None = None
        """How the body is framed that the parser does not see, for the request's `Upgrade` header."""
        self._parsing: Exchange | None = None
        self._active: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._due: Exchange | None = None
        """To be answered when the piece that is being parsed is through: then most requests are whole."""
        self._pending: deque[Exchange] = deque()
        self._refusal: HttpError | None = None
        self._deaf = False
        """Input is thrown away: it was broken, or the connection is about to end."""
        self._lingering = self._reading_paused = False
        self._write_waiter: asyncio.Future[None] | None = None
        self._write_deadline = _INF
        """For a client that does not read; it holds whatever else goes on."""
        self.deadline = _INF

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        at_once(transport)
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        self._host.connections.add(self)
        self.deadline = self._loop.time() + self._host.limits.head_timeout

    def connection_lost(self, error: Exception | None) -> None:
        self._host.left(self)
        self._transport = None
        self.deadline = _INF
        self._deaf = True
        self._gone()

    def eof_received(self) -> bool:
        """A client that stops sending has gone, unless all was answered: as nginx sees it."""
        self._gone()
        return False

    def _gone(self) -> None:
        self._pending.clear()
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_result(None)
        active, self._active = self._active, None
        if active is None:
            return
        active.lost()
        if self._task is not None and self._host.cancel_on_disconnect and not active.finished:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        # Between two requests the parser is as it was at first.
        express = None if self._active or self._parsing or self._in_head else self._host.express
        if express is not None and express.whole(self, data):
            return
        self._arriving = len(data)
        self._parses = True
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._deaf = True
            self._broken(self._refusal or malformed(error))
            return
        finally:
            self._parses = False
            due, self._due = self._due, None
            if due is not None:
                self._answer(due)
                if express is not None and due.owner is not None:
                    express.learn(data, due)
        if self._in_head:
            self._fed += len(data)
            if self._fed > self._host.limits.head:
                self._deaf = True
                self._broken(head_too_large(self._host.limits.head))
            return
        if self._parsing is None:
            return
        self._fed += len(data)
        if self._fed > _FRAMING_FREE + _FRAMING_RATIO * self._parsing.received:
            # Chunk extensions and tiny chunks: input that no limit on bodies would ever end.
            self._deaf = True
            self._broken(HttpError(400, "the chunks of the request body have more framing than data"))
        elif self.deadline != _INF:
            now = self._loop.time()
            limits = self._host.limits
            self.deadline = min(self.deadline + len(data) / limits.body_rate, now + limits.body_timeout)

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # We never upgrade: what follows is the body, or the next request.
                self._parser = httptools.HttpRequestParser(self)
                data = data[upgrade.args[0] :]
                self._expect_body()

    def _expect_body(self) -> None:
        """Have the new parser read the body that the last one stopped before."""
        framing, self._framing = self._framing, None
        if framing is not None:
            self._muted = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\nHost: x\r\n%b: %b\r\n\r\n" % framing)
            self._muted = False

    def pause_writing(self) -> None:
        self._write_waiter = self._loop.create_future()
        self._write_deadline = self.deadline = self._loop.time() + self._host.limits.write_timeout
        if self._active is not None:
            self._active.flow(True)

    def resume_writing(self) -> None:
        waiter, self._write_waiter = self._write_waiter, None
        self._write_deadline = _INF
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._active is not None:
            reads = self._active is self._parsing and self._active.awaits_body
            self.deadline = self._loop.time() + self._host.limits.body_timeout if reads else _INF
            self._active.flow(False)
        elif not self._lingering and self._transport is not None and not self._transport.is_closing():
            self._await_next()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._muted:
            return
        self._url = b""
        self._headers = []
        self._head_bytes = 0
        self._fed = 0
        self._in_head = True
        if self._active is None:
            self.deadline = self._loop.time() + self._host.limits.head_timeout
        elif len(self._pending) >= _PIPELINED_MAX:
            self._stop(HttpError(429, f"more than {_PIPELINED_MAX} requests were pipelined"))

    def on_url(self, url: bytes) -> None:
        if self._muted:
            return
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._headers.append((name.lower(), value.strip(b" \t")))
        elif not self._muted:
            self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._host.limits.head:
            self._stop(head_too_large(self._host.limits.head))

    def _stop(self, refusal: HttpError) -> NoReturn:
        self._refusal = refusal
        raise refusal

    def on_headers_complete(self) -> None:
        if self._muted:
            return
        self._in_head = False
        self.deadline = self._write_deadline
        if len(self._headers) > _HEADERS_MAX:
            self._stop(HttpError(431, f"the request has more than {_HEADERS_MAX} headers"))
        if self._fed + self._arriving > self._host.limits.head:
            # Only then can the head be too large: nearly all heads come in one small piece.
            self._count(sum(len(name) + len(value) + 4 for name, value in self._headers))
        parser = self._parser
        method = parser.get_method().decode("ascii")
        version = parser.get_http_version()
        exchange = self._exchange(method, version, parser.should_keep_alive())
        self._parsing = exchange
        if self._active is None and not self._pending:
            self._dispatch(exchange)
        else:
            self._pending.append(exchange)
            if len(self._pending) >= _READ_AHEAD:
                self._pause_reading()

    def _exchange(self, method: str, version: str, keep: bool) -> Exchange:
        try:
            head = read_head(method, version, self._url, self._headers)
        except HttpError as refusal:
            self._stop(refusal)
        self._framing = head.framing if self._parser.should_upgrade() else None
        return Exchange(
            self, method=method, target=head.target, path=head.path, headers=self._headers, peer=self._peer,
            minor=int(version[2]), keep=keep, declared=head.length, expects_continue=head.expects_continue,
        )  # fmt: skip

    def on_body(self, data: bytes) -> None:
        if self._parsing is not None:
            self._parsing.feed(data)

    def on_message_complete(self) -> None:
        if self._framing is not None:
            return
        exchange, self._parsing = self._parsing, None
        self.deadline = self._write_deadline
        if exchange is None:
            return
        exchange.complete()
        if exchange.finished:
            self._next()

    # Order of answers

    def read(self, target: str, path: str, headers: list[Header], body: bytes | memoryview) -> Exchange:
        """A whole POST with a head that the parser would take has come, and is answered next."""
        self.deadline = self._write_deadline
        self._active = exchange = Exchange(
            self, method="POST", target=target, path=path, headers=headers, peer=self._peer, minor=1,
            keep=True, declared=len(body), expects_continue=False, body=body,
        )  # fmt: skip
        return exchange

    def _dispatch(self, exchange: Exchange) -> None:
        self._active = exchange
        if self._parses:
            self._due = exchange
        else:
            self._answer(exchange)

    def _answer(self, exchange: Exchange) -> None:
        quick = self._host.quick
        if quick is None or not exchange.request_complete or not quick(exchange):
            self.run(exchange, self._host.handler)

    def run(self, exchange: Exchange, handler: Handler) -> None:
        """Have a task answer it."""
        self._task = self._loop.create_task(self._handle(exchange, handler))
        self._host.tasks.add(self._task)
        self._task.add_done_callback(self._host.tasks.discard)

    async def _handle(self, exchange: Exchange, handler: Handler) -> None:
        try:
            await handler(exchange)
        except HttpError as error:
            if exchange.started:
                exchange.abort()
            else:
                exchange.fail_with(error)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # Cancelled because the client left, or because the server is being closed.
            if not exchange.finished:
                exchange.abort()
        except Exception:
            log.exception("%s %s failed", exchange.method, exchange.path)
            if exchange.started:
                exchange.abort()
            else:
                exchange.fail_with(HttpError(500, "internal error"))
        else:
            # With an owner it goes on by callbacks.
            if not exchange.finished and not exchange.gone and exchange.owner is None:
                log.error("the handler of %s %s left it unanswered", exchange.method, exchange.path)
                exchange.abort()

    def answered(self, exchange: Exchange, keep: bool) -> None:
        if exchange is not self._active:
            return
        if not keep or self._host.closing:
            self._active = None
            self._end()
        else:
            self._next()

    def _next(self) -> None:
        self._active = None
        self._task = None
        if self._pending:
            self._dispatch(self._pending.popleft())
        elif self._refusal is not None and self._deaf:
            self._refuse(self._refusal)
        elif self._host.closing:
            self._end()
        elif self._write_waiter is None:
            self._await_next()
        if self._reading_paused and not self._pending:
            self._resume_reading()

    def _await_next(self) -> None:
        """All was answered and read: the time for the next request runs."""
        limits = self._host.limits
        self.deadline = self._loop.time() + (limits.head_timeout if self._in_head else limits.idle_timeout)

    def _broken(self, refusal: HttpError) -> None:
        """The input can't be parsed any further: say so, after the answers that are due."""
        self._refusal = refusal
        if self._parsing is not None:
            self._parsing.fail(refusal)
        elif self._active is None:
            self._refuse(refusal)

    def _refuse(self, refusal: HttpError) -> None:
        self.send(refusal.last_words())
        self._end()

    def _end(self) -> None:
        """Close so that the client still reads our last bytes: closing with unread input resets TCP."""
        self._deaf = True
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        # It stays open until the client has read the rest, which it may never do.
        unread = transport.get_write_buffer_size() > 0
        patience = self._host.limits.write_timeout if unread else _LINGER
        self.deadline = self._loop.time() + patience
        done = self._parsing is None and self._refusal is None
        if done and (self._host.closing or not transport.can_write_eof()):
            transport.close()
            return
        self._lingering = True
        self._resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    # What exchanges ask for

    @property
    def congested(self) -> bool:
        """The client does not read fast enough."""
        return self._write_waiter is not None

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def lend(self) -> int:
        """The socket, for somebody who sends on it; -1 where bytes are waiting to be sent, or with TLS."""
        transport = self._transport
        if transport is None or self._write_waiter is not None or transport.get_write_buffer_size():
            return -1
        if transport.is_closing() or transport.get_extra_info("ssl_object") is not None:
            return -1
        raw: socket.socket = transport.get_extra_info("socket")
        return raw.fileno()

    def want_body(self, exchange: Exchange) -> None:
        if exchange is self._parsing:
            self.deadline = self._loop.time() + self._host.limits.body_timeout
        self._resume_reading()

    def stop_body(self) -> None:
        self.deadline = self._write_deadline
        self._pause_reading()

    async def drain(self) -> None:
        if self._write_waiter is not None:
            await asyncio.shield(self._write_waiter)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _pause_reading(self) -> None:
        if not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    # What the server asks for

    def expire(self) -> None:
        """The deadline has passed."""
        self.deadline = _INF
        if self._transport is None:
            return
        if self._lingering or self._write_waiter is not None or self._transport.get_write_buffer_size():
            self.abort()
        elif self._parsing is not None:
            self._deaf = True
            self._parsing.fail(HttpError(408, "the request body came too slowly"))
        elif self._in_head:
            self._deaf = True
            self._refusal = HttpError(408, "the request head came too slowly")
            self._refuse(self._refusal)
        else:
            self._transport.close()

    def close_if_idle(self) -> None:
        if self._active is None and not self._pending and self._transport is not None:
            self._transport.close()
