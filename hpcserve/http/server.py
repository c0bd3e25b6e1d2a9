"""A strict HTTP/1.1 server: `serve(handler, host=…, port=…)`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from .connection import Connection
from .errors import ClientGone, HttpError
from .exchange import Exchange, Handler
from .host import Express, Quick
from .limits import Limits

__all__ = ["ClientGone", "Exchange", "Handler", "HttpError", "Limits", "Server", "serve"]

_SWEEP = 0.25
_BACKLOG = 2048
_ACCEPTORS = 16
"""Connections that are accepted in one turn of the event loop. libuv accepts one per listener and turn: with
one listener, a client that comes while the loop is busy would wait for a turn for each one before it."""
_LEAVE = 1.0


class Server:
    """A listening server; made by `serve()`."""

    def __init__(
        self,
        handler: Handler,
        *,
        limits: Limits,
        cancel_on_disconnect: bool,
        quick: Quick | None = None,
        express: Express | None = None,
    ) -> None:
        self.handler = handler
        self.quick = quick
        self.express = express
        self.limits = limits
        self.cancel_on_disconnect = cancel_on_disconnect
        self.closing = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        """All of them on one socket."""
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None
        self.port = 0

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        create = self._loop.create_unix_server if sock.family == socket.AF_UNIX else self._loop.create_server
        copies = [sock, *(sock.dup() for _ in range(_ACCEPTORS - 1))]
        self._listeners = [
            await create(lambda: Connection(self), sock=one, backlog=_BACKLOG, ssl=tls) for one in copies
        ]
        self.port = int(sock.getsockname()[1]) if sock.family != socket.AF_UNIX else 0
        self._sweep()

    def _sweep(self) -> None:
        """One timer for all connections: deadlines are coarse, and most requests never meet theirs."""
        now = self._loop.time()
        for connection in [c for c in self.connections if c.deadline <= now]:
            connection.expire()
        self._sweeper = self._loop.call_later(_SWEEP, self._sweep)

    def left(self, connection: Connection) -> None:
        """A connection is gone (called by it)."""
        self.connections.discard(connection)
        if self._emptied is not None and not self.connections:
            self._emptied.set()

    def stop_listening(self) -> None:
        """Take no new connections; those there are go on."""
        for listener in self._listeners:
            listener.close()

    async def close(self, grace: float = 0.0) -> None:
        """Stop listening, let running exchanges finish for up to `grace` seconds, cut the rest."""
        self.closing = True
        self.stop_listening()
        for connection in list(self.connections):
            connection.close_if_idle()
        if self.tasks and grace > 0:
            deadline = self._loop.time() + grace
            await asyncio.wait(list(self.tasks), timeout=grace)
            # Answers are written; let the last bytes leave.
            await self._until_left(deadline - self._loop.time())
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = list(self.tasks)
        for connection in list(self.connections):
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._until_left(_LEAVE)

    async def _until_left(self, grace: float) -> None:
        if self.connections and grace > 0:
            self._emptied = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), grace)


async def serve(
    handler: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    sock: socket.socket | None = None,
    limits: Limits | None = None,
    cancel_on_disconnect: bool = False,
    quick: Quick | None = None,
    express: Express | None = None,
    tls: ssl.SSLContext | None = None,
) -> Server:
    """Listen on `sock` if given (it may already be bound), else on `host`:`port`; port 0 takes a free one.

    With `cancel_on_disconnect` a handler is cancelled when its client goes away. `quick` is asked first about
    requests that came whole, and answers those it takes without a task; `express` is asked before the parser.
    Raises OSError.
    """
    server = Server(
        handler,
        limits=limits or Limits(),
        cancel_on_disconnect=cancel_on_disconnect,
        quick=quick,
        express=express,
    )
    await server.listen(sock or bind(host, port), tls)
    return server


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError, also when another one listens on the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        # Two sockets with SO_REUSEADDR can both bind; only the first of them can listen.
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
