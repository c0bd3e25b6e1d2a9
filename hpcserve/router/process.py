"""A relay: one process of the endpoint that answers requests, told what to do by the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import signal
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import ConfigError
from ..http import server
from . import tls
from .app import Router
from .board import Board, SharedBoard
from .config import RouterConfig
from .control import (
    Ask,
    Control,
    Drain,
    Facts,
    Force,
    FromSupervisor,
    Gathered,
    KVEvents,
    Leave,
    Poll,
    Reload,
    Table,
    Totals,
)
from .kv.messages import SharedMessage
from .workers import Worker

log = logging.getLogger(__name__)

_SUSPECT_EVERY = 1.0
_LAST_BYTES = 2.0
_NEWS_EVERY = 0.1
_YOUNG = 10_000
_GATHERED = 2.0
"""Seconds to wait for the figures of the other relays; those that are late are left out."""
FORCED = 1
"""Exit status after an order to exit at once."""

_decoder: msgspec.json.Decoder[FromSupervisor] = msgspec.json.Decoder(FromSupervisor)


class Relay:
    """Runs one Router until it is drained or forced to stop."""

    def __init__(self, config: RouterConfig, *, number: int, board_fd: int | None) -> None:
        # The supervisor's table comes first and names their slots.
        self._config = dataclasses.replace(config, workers=())
        board = Board()
        if board_fd is not None:
            board = SharedBoard(board_fd, processes=config.processes, process=number)
        others = self._gather if config.processes > 1 else None
        self._router = Router(self._config, on_suspect=self._suspect, board=board, others=others)
        self._control: Control[FromSupervisor] = Control(
            self._on_message, self._orphaned, _decoder, other="supervisor"
        )
        self._suspected: dict[str, float] = {}
        self._gathers: dict[int, asyncio.Future[tuple[dict[str, Any], ...]]] = {}
        self._numbers = itertools.count()
        self._told = asyncio.Event()
        """The first table has come."""
        self._exit = asyncio.Event()
        self._force = asyncio.Event()
        self._leave = asyncio.Event()
        self._listening: list[server.Server] = []
        self._tls: ssl.SSLContext | None = None

    async def run(self, control_fd: int, sockets: Sequence[socket.socket]) -> int:
        """Serve on `sockets` until the end; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Ctrl-C and `scancel` reach every process; the supervisor hears them and tells us.
            loop.add_signal_handler(number, lambda: None)
        await self._control.open(control_fd)
        await self._told.wait()
        if self._config.tls_cert is not None:
            self._tls = tls.context(self._config.tls_cert, self._config.tls_key)
        for sock in sockets:
            spoken = self._tls if sock.family != socket.AF_UNIX else None
            self._listening.append(
                await server.serve(
                    self._router.handle,
                    quick=self._router.fast_path.quick,
                    express=self._router.fast_path,
                    sock=sock,
                    cancel_on_disconnect=True,
                    tls=spoken,
                )
            )
        # What was made so far lives as long as the process: the collector need not look at it again. A
        # request makes hundreds of objects and hardly a cycle, so looking at each 700 new ones is waste.
        gc.freeze()
        gc.set_threshold(_YOUNG, 10, 20)
        self._control.insist({"type": "ready"})
        telling = asyncio.create_task(self._tell_news())
        await self._exit.wait()
        await self._until_idle()
        self._control.insist({"type": "drained"})
        await self._leave.wait()
        telling.cancel()
        forced = self._force.is_set()
        self._tell_usage()
        self._control.send(self._router.stats())
        for listening in self._listening:
            await listening.close(0.0 if forced else _LAST_BYTES)
        await self._router.close()
        await self._control.close()
        return FORCED if forced else 0

    async def _until_idle(self) -> None:
        """Requests that are being refused still get their answer; an order to exit now ends the wait."""
        idle = asyncio.create_task(self._router.idle.wait())
        forced = asyncio.create_task(self._force.wait())
        await asyncio.wait((idle, forced), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        forced.cancel()

    def _drain(self, reason: str) -> None:
        self._router.drain(reason)
        self._told.set()
        self._exit.set()

    def _orphaned(self) -> None:
        """Leave the port to the next supervisor, and finish what runs."""
        for listening in self._listening:
            listening.stop_listening()
        self._leave.set()
        self._drain("the router's supervisor is gone")

    def _on_message(self, message: FromSupervisor) -> None:
        match message:
            case Table():
                self._router.update(message)
                self._told.set()
            case Poll():
                self._tell_usage()
                self._control.insist(self._router.stats())
            case Ask(number=number, query=query):
                data = self._router.snapshot(query)
                self._control.insist({"type": "snapshot", "number": number, "data": data})
            case Gathered(number=number, parts=parts):
                waiting = self._gathers.pop(number, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(parts)
            case Drain():
                self._drain("the endpoint is shutting down")
            case Force():
                self._force.set()
                self._leave.set()
                self._drain("the endpoint is shutting down")
            case Leave():
                self._leave.set()
            case Reload():
                self._reload()
            case SharedMessage():
                self._router.residency.apply(message, now=asyncio.get_running_loop().time())
            case KVEvents() | Facts() | Totals():
                self._router.hear(message)

    def _tell_usage(self) -> None:
        """What keys used since the last time: the supervisor writes it down."""
        items = self._router.meter.take()
        if items:
            self._control.insist({"type": "usage", "items": items})

    async def _tell_news(self) -> None:
        """What the other relays should know of this one's prompts, and that it lacks something itself."""
        residency = self._router.residency
        while True:
            await asyncio.sleep(_NEWS_EVERY)
            shared = residency.outgoing()
            if shared is not None:
                self._control.send(shared)
            if residency.missing:
                residency.missing = False
                self._control.send({"type": "kv_missing"})

    def _reload(self) -> None:
        if self._tls is not None and self._config.tls_cert is not None:
            try:
                tls.load(self._tls, self._config.tls_cert, self._config.tls_key)
            except ConfigError as error:
                log.error("the certificate stays as it is: %s", error)
        self._router.hear(Reload())

    async def _gather(self, query: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """The snapshots of the other relays, by way of the supervisor."""
        number = next(self._numbers)
        waiting: asyncio.Future[tuple[dict[str, Any], ...]] = asyncio.get_running_loop().create_future()
        self._gathers[number] = waiting
        self._control.insist({"type": "gather", "number": number, "query": query})
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(waiting, _GATHERED)
        self._gathers.pop(number, None)
        log.warning("the figures of the other relays did not come within %g s", _GATHERED)
        return ()

    def _suspect(self, worker: Worker, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._suspected.get(worker.name, -_SUSPECT_EVERY) >= _SUSPECT_EVERY:
            self._suspected[worker.name] = now
            self._control.send({"type": "suspect", "worker": worker.name, "reason": reason})
