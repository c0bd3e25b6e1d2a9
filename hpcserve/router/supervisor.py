"""The first process of an endpoint: keeps its port, runs its relays, passes on what the head node says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import resource
import signal
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import sockets, tls
from .board import SLOTS, SharedBoard
from .child import Child
from .config import RouterConfig, WorkerSpec
from .control import (
    Ask,
    Control,
    Drain,
    Facts,
    Force,
    FromHead,
    Gathered,
    Json,
    KVEvents,
    Leave,
    Reload,
    Table,
    Totals,
)
from .keys.ledger import Ledger
from .kv_feed import KvFeed
from .watch import Models, Watch

log = logging.getLogger(__name__)

_STATS_EVERY = 0.5
_POLL_PATIENCE = 2.0
_GATHER_PATIENCE = 1.5
_UNANSWERED_MAX = 5
"""Polls of _POLL_PATIENCE each without an answer to one: that relay hangs, and its clients with it."""
_UNREAD_MAX = 64 * 1024 * 1024
"""A relay that leaves so much unread hangs; it is started again."""
_STEADY = 30.0
"""Seconds a relay must live for its next start to come at once."""
_BACKOFF = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
_FORCED_END = 3.0
FORCED = 1
"""Exit status after a second SIGTERM."""

_decoder: msgspec.json.Decoder[FromHead] = msgspec.json.Decoder(FromHead)


class Supervisor:
    """Runs `config.processes` relays until they are drained or forced to stop."""

    def __init__(self, config: RouterConfig, config_path: Path) -> None:
        self._config = config
        self._config_path = config_path
        self._head: Control[FromHead] = Control(
            self._on_head, lambda: self._drain("the head node is gone"), _decoder
        )
        self._children: list[Child] = []
        self._board: SharedBoard | None = None
        self._slots = Slots()
        self._table = Table(state="starting")
        self._tables = 0
        """Tables taken so far: a report with this number is by relays that know the last one."""
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._buried: Json = {}
        """Counters of relays that died: they must not go back."""
        self._gathers: dict[int, _Gather] = {}
        self._numbers = itertools.count()
        self._watch = Watch(config)
        self._feed = KvFeed(config.kv_events, self._tell) if config.kv_events else None
        self._ledger = Ledger(config.usage) if config.usage is not None else None
        self._report_now = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._leaving = False
        self._forced = False

    async def run(self, control_fd: int | None) -> int:
        """Serve until the end; returns the exit status. Raises ConfigError when no port is free."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._tell(Reload()))
        _raise_file_limit()
        config = self._config
        if config.tls_cert is not None:
            tls.context(config.tls_cert, config.tls_key)
        bound = sockets.bind_all(config.host, config.ports, config.processes)
        port = int(bound[0].getsockname()[1])
        unix = sockets.bind_unix(config.unix_socket) if config.unix_socket is not None else None
        if config.processes > 1:
            self._board = SharedBoard.create(config.processes)
        for number, sock in enumerate(bound):
            self._children.append(
                Child(
                    number,
                    config=self._config_path,
                    sockets=[sock, unix] if unix is not None else [sock],
                    board_fd=self._board.fd if self._board is not None else None,
                    on_message=self._on_relay,
                )
            )
        if control_fd is not None:
            await self._head.open(control_fd)
        keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
        works = (self._announce(port), self._report(), self._ask(), self._keep_ledger())
        helpers = [asyncio.create_task(work) for work in works]
        try:
            statuses = await asyncio.gather(*keepers)
        finally:
            for helper in helpers:
                helper.cancel()
            with contextlib.suppress(FileNotFoundError):
                if unix is not None and config.unix_socket is not None:
                    config.unix_socket.unlink()
        if self._ledger is not None:
            self._ledger.close()
        self._head.send(self._stats())
        await self._watch.close()
        await self._head.close()
        return FORCED if self._forced else max(statuses)

    async def _announce(self, port: int) -> None:
        await self._all_ready.wait()
        config = self._config
        self._head.send({"type": "listening", "host": config.host, "port": port})
        scheme = "https" if config.tls_cert is not None else "http"
        log.info("listening on %s://%s:%d (%d processes)", scheme, config.host, port, config.processes)
        if config.unix_socket is not None:
            log.info("listening on %s", config.unix_socket)

    async def _ask(self) -> None:
        """Health of workers that no head node watches, and what engines say of themselves."""
        async with asyncio.TaskGroup() as group:
            if self._config.workers:
                group.create_task(self._watch.alive(self._config.workers, self._answering))
            group.create_task(self._watch.facts(lambda: self._table.workers, self._busy, self._on_facts))
            group.create_task(self._watch.models(lambda: self._table.workers, self._on_models))
            if self._feed is not None:
                group.create_task(self._feed.run())

    async def _keep_ledger(self) -> None:
        if self._ledger is not None:
            await self._ledger.run(
                busy=lambda: any(child.stats.get("in_flight") for child in self._children),
                tell=lambda totals: self._tell(Totals(totals=totals)),
            )

    # Relays

    async def _keep(self, child: Child) -> int:
        """Run a relay, and another one each time it dies, until we leave; returns the last one's status."""
        loop = asyncio.get_running_loop()
        quick_deaths = 0
        while True:
            began = loop.time()
            await child.start([self._table, *self._sticky()])
            if self._leaving:
                child.tell(Force() if self._forced else Drain())
            status = await child.wait()
            self._bury(child)
            if self._leaving:
                child.close_sockets()
                self._part()
                return status
            if not child.served:
                # It said why on stderr, and the next one would say the same.
                self._leave()
                child.close_sockets()
                return status or 1
            quick_deaths = 0 if loop.time() - began > _STEADY else quick_deaths + 1
            delay = _BACKOFF[min(max(quick_deaths - 1, 0), len(_BACKOFF) - 1)]
            log.error(
                "relay %d ended with status %d; the next one starts in %g s", child.number, status, delay
            )
            await asyncio.sleep(delay)

    def _bury(self, child: Child) -> None:
        if self._board is not None:
            self._board.clear(child.number)
        counted: Json = {key: child.stats[key] for key in ("requests", "errors") if key in child.stats}
        self._buried = add_up([self._buried, counted])
        child.stats = {}
        for gather in list(self._gathers.values()):
            gather.waiting.discard(child.number)
            self._finish(gather)

    def _sticky(self) -> list[Any]:
        """What a relay that starts later must know besides the table."""
        known: list[Any] = [Facts(facts=self._facts)] if self._facts else []
        if self._ledger is not None:
            known.append(Totals(totals=self._ledger.totals()))
        return known

    def _tell(self, message: Any) -> None:
        for child in self._children:
            child.tell(message)
            if child.unread > _UNREAD_MAX:
                log.error("relay %d does not listen any more: killing it", child.number)
                child.kill()

    def _on_relay(self, child: Child, message: Json) -> None:
        match message.get("type"):
            case "ready":
                if all(other.ready for other in self._children):
                    self._all_ready.set()
            case "drained":
                self._part()
            case "suspect":
                self._head.send(message)
                self._watch.kick()
            case "usage":
                if self._ledger is not None:
                    self._ledger.add(message["items"])
            case "kv_shared":
                for other in self._children:
                    if other is not child:
                        other.tell(message)
            case "kv_missing":
                self._head.send(message)
                if self._feed is not None:
                    self._feed.start_over()
            case "gather":
                self._gather(child, message["number"], message["query"])
            case "snapshot":
                gather = self._gathers.get(message["number"])
                if gather is not None and child.number in gather.waiting:
                    gather.waiting.discard(child.number)
                    gather.parts.append(message["data"])
                    self._finish(gather)

    def _gather(self, asking: Child, theirs: int, query: Json) -> None:
        others = [child for child in self._children if child.ready and child is not asking]
        number = next(self._numbers)
        gather = _Gather(number, asking, theirs, {child.number for child in others})
        self._gathers[number] = gather
        for child in others:
            child.tell(Ask(number=number, query=query))
        asyncio.get_running_loop().call_later(_GATHER_PATIENCE, self._finish, gather, True)
        self._finish(gather)

    def _finish(self, gather: _Gather, late: bool = False) -> None:
        if (late or not gather.waiting) and self._gathers.pop(gather.number, None) is not None:
            gather.asking.tell(Gathered(number=gather.theirs, parts=tuple(gather.parts)))

    # What the head node says, or who answers where there is none

    def _on_head(self, message: FromHead) -> None:
        match message:
            case Drain():
                self._drain("the head node says so")
            case Table():
                self._take(message)
            case Reload() | KVEvents():
                self._tell(message)

    def _answering(self, specs: tuple[WorkerSpec, ...]) -> None:
        self._take(Table(state="ready", workers=specs))

    def _take(self, table: Table) -> None:
        self._tables += 1
        known = {(spec.name, spec.generation): spec.models for spec in self._table.workers}
        workers = tuple(
            msgspec.structs.replace(spec, models=spec.models or known.get((spec.name, spec.generation), ()))
            for spec in self._slots.assign(table.workers)
        )
        if any(not spec.models for spec in workers):
            self._watch.kick_models()
        self._table = msgspec.structs.replace(table, workers=workers)
        names = {worker.name for worker in workers}
        self._facts = {name: facts for name, facts in self._facts.items() if name in names}
        self._tell(self._table)
        self._report_now.set()

    def _on_models(self, models: Mapping[str, Models]) -> None:
        """What workers serve, adapters loaded since among it."""
        workers = tuple(
            msgspec.structs.replace(spec, models=models.get(spec.name, spec.models))
            for spec in self._table.workers
        )
        self._table = msgspec.structs.replace(self._table, workers=workers)
        self._tell(self._table)

    def _busy(self, worker: str) -> bool:
        """Has any relay a request there, as of its last report?"""
        return any(
            child.stats.get("workers", {}).get(worker, {}).get("in_flight") for child in self._children
        )

    def _on_facts(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self._facts.update(facts)
        self._tell(Facts(facts=facts))

    async def _report(self) -> None:
        while True:
            self._report_now.clear()
            tables = self._tables
            await self._poll()
            if self._report_now.is_set():
                # Relays answered before they had the newest table: that is no answer to it.
                continue
            self._head.send(self._stats() | {"tables": tables})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._report_now.wait(), _STATS_EVERY)

    async def _poll(self) -> None:
        polls = [asyncio.create_task(child.poll()) for child in self._children if child.ready]
        if polls:
            _, late = await asyncio.wait(polls, timeout=_POLL_PATIENCE)
            for poll in late:
                poll.cancel()
        for child in self._children:
            # Counted, and not timed: this process may have been stopped itself.
            if child.unanswered >= _UNANSWERED_MAX:
                log.error("relay %d did not answer %d times: killing it", child.number, child.unanswered)
                child.kill()

    def _stats(self) -> Json:
        """The relays' figures, summed. Each is newer than the report before this one."""
        return {"type": "stats"} | add_up(
            [{"in_flight": 0, "requests": 0, "errors": 0, "workers": {}}, self._buried]
            + [child.stats for child in self._children]
        )

    # The end

    def _on_signal(self) -> None:
        if self._leaving:
            self._forced = True
            self._tell(Force())
            asyncio.get_running_loop().call_later(_FORCED_END, self._kill)
        else:
            self._drain("a signal says so")

    def _drain(self, why: str) -> None:
        if not self._leaving:
            log.info("draining: %s", why)
        self._leave()

    def _leave(self) -> None:
        self._leaving = True
        self._tell(Drain())

    def _part(self) -> None:
        """Relays leave together: whichever a client meets until then says that the endpoint drains."""
        if self._leaving and all(child.drained for child in self._children):
            self._tell(Leave())

    def _kill(self) -> None:
        for child in self._children:
            child.kill()


class _Gather:
    """A relay's question to all others."""

    def __init__(self, number: int, asking: Child, theirs: int, waiting: set[int]) -> None:
        self.number = number
        self.asking = asking
        self.theirs = theirs
        self.waiting = waiting
        self.parts: list[Json] = []


class Slots:
    """Places on the board: one per worker name, used again once the worker has left."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free = deque(range(SLOTS))

    def assign(self, specs: Iterable[WorkerSpec]) -> list[WorkerSpec]:
        """The same workers with their slots. Those above the board's size get none: their load is seen
        by each process alone."""
        specs = list(specs)
        for name in self._slots.keys() - {spec.name for spec in specs}:
            self._free.append(self._slots.pop(name))
        placed = []
        for spec in specs:
            if spec.name not in self._slots and self._free:
                self._slots[spec.name] = self._free.popleft()
            placed.append(msgspec.structs.replace(spec, slot=self._slots.get(spec.name)))
        if len(specs) > SLOTS:
            log.error("%d workers: the load of those above %d is not shared", len(specs), SLOTS)
        return placed


def add_up(parts: Iterable[Mapping[str, Any]]) -> Json:
    """Numbers under the same key summed, also in mappings below."""
    total: Json = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                total[key] = add_up([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


def _raise_file_limit() -> None:
    """Each stream is two sockets: the usual soft limit of 1024 would end at 500 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
