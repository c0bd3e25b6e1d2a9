"""Carries running streams without Python, where the compiled module `pump.pyx` is there to do it."""

from __future__ import annotations

import asyncio
from typing import Any

from ...http.compiled import compiled as module
from ...http.exchange import Exchange
from ...http.upstream import UpstreamConnection
from .generated import GeneratedStream


def compiled() -> Any | None:
    """The module `pump`; None, with a warning, where it can't be used: streams then go by the event loop."""
    gate = module("router.stream.gate", "each stream")
    return None if gate is None else module("router.stream.pump", "each stream")


class Pumping:
    """The pump of one event loop."""

    def __init__(self, module: Any, loop: asyncio.AbstractEventLoop) -> None:
        """`module` is the compiled one."""
        self.line = module.Line
        self.loop = loop
        self.pump = module.Pump()
        loop.add_reader(self.pump.fileno(), self.pump.run)

    def close(self) -> None:
        self.loop.remove_reader(self.pump.fileno())


class Ride:
    """One stream's way from an engine to a client, some of it on the pump."""

    __slots__ = ("_connection", "_exchange", "_line", "_pumping", "_stream")

    def __init__(
        self, pumping: Pumping, connection: UpstreamConnection, exchange: Exchange, stream: GeneratedStream
    ) -> None:
        self._pumping = pumping
        self._connection: UpstreamConnection | None = connection
        self._exchange = exchange
        self._stream = stream
        self._line: Any = None

    @property
    def pieces(self) -> int:
        """Pieces on the pump that are not in the stream's account yet."""
        return 0 if self._line is None else int(self._line.pieces)

    def board(self) -> None:
        """The stream's last event was a usual one: let the pump carry it, until something else comes."""
        # Not now: what was just written is still on its way.
        self._pumping.loop.call_soon(self._board)

    def _board(self) -> None:
        stream, connection = self._stream, self._connection
        if connection is None or self._line is not None or not stream.steady or not stream.whole:
            return
        sink = self._exchange.lend()
        source = connection.lend() if sink >= 0 else -1
        if source < 0:
            return
        mark, close = stream.marks
        self._line = self._pumping.line(
            source, sink, self._back, mark=mark, close=close, keep_ids=stream.wants_ids
        )
        self._pumping.pump.add(self._line)

    def _back(self, unread: bytes, unsent: bytes) -> None:
        """Bytes that the pump has not understood, and those that the client did not take."""
        self._settle()
        if unsent:
            self._exchange.send_framed(unsent)
        if self._connection is not None:
            self._connection.take_back(unread)

    def end(self) -> None:
        """Carry it no more."""
        self._connection = None
        if self._line is not None:
            self._pumping.pump.remove(self._line)
            self._settle()

    def _settle(self) -> None:
        line, self._line = self._line, None
        line.settle(self._stream)
