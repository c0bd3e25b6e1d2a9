"""The server, as its connections see it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .exchange import Exchange, Handler
from .limits import Limits

if TYPE_CHECKING:
    from .connection import Connection

Quick = Callable[[Exchange], bool]
"""Answers a request by callbacks, if it is one of those that can be; False: nothing was done about it."""


class Express(Protocol):
    """Answers requests whose heads came before, without parsing them."""

    def whole(self, wire: Connection, data: bytes) -> bool:
        """`data` is what came while no request was read or answered. False: nothing was done about it."""
        ...

    def learn(self, data: bytes, exchange: Exchange) -> None:
        """`quick` answered `exchange`, whose request was all of `data`, by the strict parser."""
        ...


class Host(Protocol):
    """The server that owns connections."""

    handler: Handler
    quick: Quick | None
    express: Express | None
    limits: Limits
    cancel_on_disconnect: bool
    closing: bool
    connections: set[Connection]
    tasks: set[asyncio.Task[None]]

    def left(self, connection: Connection) -> None: ...


def at_once(transport: asyncio.BaseTransport) -> None:
    """Have the kernel send what is written, and not wait for more."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
