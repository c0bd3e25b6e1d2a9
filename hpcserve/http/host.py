"""The server, as its connections see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .exchange import Exchange, Handler
from .limits import Limits

if TYPE_CHECKING:
    from .connection import Connection

Quick = Callable[[Exchange], bool]
"""Answers a request by callbacks, if it is one of those that can be; False: nothing was done about it."""


class Host(Protocol):
    """The server that owns connections."""

    handler: Handler
    quick: Quick | None
    limits: Limits
    cancel_on_disconnect: bool
    closing: bool
    connections: set[Connection]
    tasks: set[asyncio.Task[None]]

    def left(self, connection: Connection) -> None: ...
