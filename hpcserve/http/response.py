"""An upstream's answer: as callbacks, or for a task to wait for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol

from .errors import Header, UpstreamError

_UNREAD_HIGH = 256 * 1024

Sink = Callable[[bytes], None]


class Source(Protocol):
    """The connection an answer comes from."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


class Reader(Protocol):
    """Takes an answer as it comes. All is called from the event loop, and must not raise."""

    def head(self, status: int, headers: list[Header]) -> None:
        """Status and headers are here. Called from within the parser: note them, and do nothing else."""
        ...

    def feed(self, data: bytes) -> None:
        """A piece of the body, and not the last one."""
        ...

    def end(self, last: bytes) -> None:
        """The body is whole with its `last` piece, which may be empty; the connection is in the pool."""
        ...

    def fail(self, error: UpstreamError) -> None:
        """There will be no more."""
        ...


class UpstreamResponse:
    """An answer for a task to read, once its head has arrived. Read it to its end, or `abort()` it.

    `async with` aborts what was not read; a connection whose answer was read whole is used again.
    """

    __slots__ = (
        "_arrived", "_buffer", "_buffered", "_connection", "_ended", "_error", "_sink", "_waiter", "headers",
        "status",
    )  # fmt: skip

    def __init__(self, connection: Source | None) -> None:
        """None: the answer has left its connection already."""
        self.status = 0
        self.headers: list[Header] = []
        self._connection = connection
        self._arrived: asyncio.Future[None] | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered = 0
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Exception | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first header called `name` (lower-case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def length(self) -> int | None:
        """The announced Content-Length."""
        value = self.header(b"content-length")
        return int(value) if value is not None else None

    @property
    def ended(self) -> bool:
        """The body has arrived whole (parts of it may still be unread)."""
        return self._ended

    async def __aenter__(self) -> UpstreamResponse:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    async def arrival(self) -> None:
        """Wait for the head. Raises UpstreamError."""
        if self.status or self._error is not None:
            if self._error is not None:
                raise self._error
            return
        self._arrived = asyncio.get_running_loop().create_future()
        try:
            await self._arrived
        except asyncio.CancelledError:
            self.abort()
            raise

    async def next_chunk(self) -> bytes:
        """The next piece of the body, b"" at its end. Raises UpstreamError when it breaks off."""
        while not self._buffer:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            self._resume()
            await self._wait()
        chunk = self._buffer.popleft()
        self._buffered -= len(chunk)
        return chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.next_chunk():
            yield chunk

    async def read(self, limit: int) -> bytes:
        """The rest of the body. Raises UpstreamError, `too-large` above `limit` bytes."""
        pieces = []
        size = 0
        while chunk := await self.next_chunk():
            size += len(chunk)
            if size > limit:
                self.abort()
                raise UpstreamError("too-large", f"the answer is larger than {limit} bytes")
            pieces.append(chunk)
        return b"".join(pieces)

    async def pipe(self, sink: Sink, hold: Callable[[], None] | None = None) -> None:
        """Call `sink` with each piece as it arrives, from the event loop and without waking a task.

        `hold` is called before the last pieces, where they come with the end: there will be no more.
        Returns at the end of the body. Raises UpstreamError when it breaks off.
        """
        self._drain(sink, hold)
        if self._ended:
            return
        if self._error is not None:
            raise self._error
        self._sink = sink
        self._resume()
        try:
            await self._wait()
        finally:
            self._sink = None
        if self._error is not None:
            raise self._error
        self._drain(sink, hold)

    def _drain(self, sink: Sink, hold: Callable[[], None] | None) -> None:
        if hold is not None and self._ended:
            hold()
        while self._buffer:
            sink(self._buffer.popleft())
        self._buffered = 0

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def pause(self) -> None:
        """Read no more from the other side for now: its TCP window fills and it waits."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._resume()

    def _resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def abort(self, error: Exception | None = None) -> None:
        """Close the connection unless the answer is whole: the other side sees its client gone.

        Whoever still reads gets `error`, or UpstreamError.
        """
        connection, self._connection = self._connection, None
        if connection is not None and not self._ended:
            self._error = self._error or error or UpstreamError("reset", "aborted")
            connection.abort()
            self._wake()

    # Called by the connection.

    def head(self, status: int, headers: list[Header]) -> None:
        self.status, self.headers = status, headers
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def feed(self, data: bytes) -> None:
        if self._sink is not None:
            try:
                self._sink(data)
            except Exception as error:
                # The reader's fault belongs to the task in pipe(), not to the event loop.
                self._sink = None
                self.abort(error)
            return
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered > _UNREAD_HIGH and self._connection is not None:
            self._connection.pause()
        self._wake()

    def end(self, last: bytes) -> None:
        """The body is whole with its `last` piece."""
        if last:
            self._buffer.append(last)
            self._buffered += len(last)
        self._ended = True
        self._connection = None
        self._wake()

    def fail(self, error: UpstreamError) -> None:
        self._error = self._error or error
        self._connection = None
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_exception(error)
        self._wake()
