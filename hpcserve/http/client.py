"""A pooled HTTP/1.1 client that hands on raw body bytes: `Pool().request("POST", url, …)`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from time import monotonic

from .errors import Header, HttpError, UpstreamError
from .heads import Heads
from .response import UpstreamResponse
from .upstream import Origin, UpstreamConnection

__all__ = ["HttpError", "Pool", "UpstreamError", "UpstreamResponse"]


class Pool:
    """Keep-alive connections to any number of origins; no cap on how many are open at once.

    Times are seconds. `idle_timeout` must be below the other side's (uvicorn's is 5).
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        idle_timeout: float = 4.0,
        idle_per_origin: int = 256,
        answers: Heads | None = None,
    ) -> None:
        """With `answers`, heads that came before are not parsed again."""
        self.answers = answers
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._idle_per_origin = idle_per_origin
        self._idle: dict[Origin, deque[UpstreamConnection]] = {}
        self._open: set[UpstreamConnection] = set()
        self._closed = False

    async def request(
        self, method: str, url: str, *, headers: Sequence[Header] = (), body: bytes = b""
    ) -> UpstreamResponse:
        """Send a request to `http://HOST:PORT/TARGET`; returns when the head of the answer is here.

        Host and Content-Length are added. Raises UpstreamError. An idle connection that turns out to be
        closed before any byte of the answer is replaced once, by a new one.
        """
        origin, host, target = split(url)
        request = encode(method, host, target, headers, body)
        connection = self.take(origin)
        if connection is not None:
            try:
                return await connection.exchange(request, is_head=method == "HEAD")
            except UpstreamError as error:
                if error.fault != "reset" or connection.heard:
                    raise
        connection = await self.connect(origin)
        return await connection.exchange(request, is_head=method == "HEAD")

    async def upload(
        self, method: str, url: str, *, headers: Sequence[Header], pieces: AsyncIterator[bytes]
    ) -> UpstreamResponse:
        """`request()` with a body that is sent piece by piece, as fast as the other side takes it.

        Returns when the head of the answer is here, which may be before all was sent: then the rest is not.
        Raises UpstreamError, and what `pieces` raises. The connection is a new one, and used once.
        """
        origin, host, target = split(url)
        framing = ((b"transfer-encoding", b"chunked"), (b"connection", b"close"))
        head = encode(method, host, target, (*headers, *framing), None)
        connection = await self.connect(origin)
        response = UpstreamResponse(connection)
        connection.ask(head, response)
        try:
            async for piece in pieces:
                if response.status or not connection.usable:
                    break
                await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            else:
                await connection.send(b"0\r\n\r\n")
        except BaseException:
            connection.abort()
            raise
        await response.arrival()
        return response

    async def connect(self, origin: Origin) -> UpstreamConnection:
        """A new connection. Raises UpstreamError."""
        loop = asyncio.get_running_loop()
        where = f"{origin[0]}:{origin[1]}"
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self, origin), *origin
                )
        except TimeoutError:
            raise UpstreamError(
                "connect", f"{where} did not accept a connection in {self._connect_timeout:g} s"
            ) from None
        except OSError as error:
            raise UpstreamError("connect", f"can't connect to {where}: {error.strerror or error}") from error
        return connection

    def take(self, origin: Origin) -> UpstreamConnection | None:
        """An idle connection; None when there is none."""
        idle = self._idle.get(origin)
        if not idle:
            return None
        oldest = monotonic() - self._idle_timeout
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.usable:
                return connection
            connection.abort()
        return None

    def put(self, connection: UpstreamConnection, origin: Origin) -> None:
        """Keep a connection for later (called by it when its answer is whole)."""
        idle = self._idle.get(origin)
        if idle is None:
            idle = self._idle[origin] = deque()
        if self._closed or len(idle) >= self._idle_per_origin:
            connection.abort()
            return
        now = monotonic()
        while idle and idle[0].idle_since <= now - self._idle_timeout:
            idle.popleft().abort()
        connection.idle_since = now
        idle.append(connection)

    def opened(self, connection: UpstreamConnection) -> None:
        self._open.add(connection)

    def forget(self, connection: UpstreamConnection, origin: Origin) -> None:
        """Drop a connection that was closed (called by it)."""
        self._open.discard(connection)
        idle = self._idle.get(origin)
        if idle is not None:
            if connection in idle:
                idle.remove(connection)
            if not idle:
                del self._idle[origin]

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def close(self) -> None:
        """Cut every connection, busy or idle."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)


@lru_cache(maxsize=4096)
def split(url: str) -> tuple[Origin, str, str]:
    """Of an `http://` URL: where to connect, the Host header, and the target. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme != "http" or not host:
        raise ValueError(f"not an http:// URL: {url}")
    name, colon, port = host.rpartition(":")
    if not colon or name.endswith(":") or (name.startswith("[") and not name.endswith("]")):
        name, port = host, "80"
    return (name.strip("[]"), int(port)), host, slash + path or "/"


def encode(
    method: str, host: str, target: str, headers: Sequence[Header], body: bytes | None
) -> tuple[bytes, ...]:
    """A request on the wire, in one piece or, with a long body, in several; None: its body comes later."""
    lines = [f"{method} {target} HTTP/1.1".encode("ascii"), b"host: " + host.encode("ascii")]
    lines += map(b": ".join, headers)
    if body or (body is not None and method in ("POST", "PUT", "PATCH")):
        lines.append(b"content-length: %d" % len(body))
    head = b"\r\n".join(lines)
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise ValueError("a request header has a line break in it")
    if body is None:
        return (head + b"\r\n\r\n",)
    return (head, b"\r\n\r\n", body) if len(body) > 16384 else (b"%b\r\n\r\n%b" % (head, body),)
