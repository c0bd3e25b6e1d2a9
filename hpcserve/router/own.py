"""What the router answers itself: health, metrics, models and the reasons of its decisions."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from .. import __version__
from ..http.errors import HttpError
from ..http.exchange import Exchange
from . import routes
from .call import id_headers
from .keys.identity import ANYONE, RUN, Identity
from .metrics import Gauge, Labels, Metrics
from .why.ring import MOST

if TYPE_CHECKING:
    from .app import Router

Json = dict[str, Any]
Others = Callable[[Json], Awaitable[Sequence[Json]]]
"""Asks every other relay of this endpoint for its `snapshot(query)`."""


class Own:
    """Answers for one Router."""

    def __init__(self, router: Router, others: Others | None) -> None:
        self._router = router
        self._others = others
        self._created = int(time.time())

    async def answer(
        self, exchange: Exchange, route: routes.Route, request_id: str, identity: Identity
    ) -> None:
        """Answer a request for one of our own routes. Raises HttpError."""
        kind = b"application/json"
        if route is routes.METRICS:
            vllm = parse_qs(exchange.query).get("aliases") == ["vllm"]
            body = (await self.metrics_text(private=identity in (RUN, ANYONE), vllm=vllm)).encode()
            kind = b"text/plain; version=0.0.4; charset=utf-8"
        elif route is routes.MODELS:
            body = msgspec.json.encode({"object": "list", "data": self._cards(identity)})
        elif route is routes.MODEL:
            body = self._model(exchange, identity)
        else:
            body = msgspec.json.encode({"object": "list", "data": await self._decisions(exchange, identity)})
        exchange.respond(200, body, kind, id_headers(exchange.path, request_id))

    def health(self, exchange: Exchange, request_id: str) -> None:
        router = self._router
        why = router.unavailable()
        status: Json = {"status": "ok" if why is None else router.state, "in_flight": router.in_flight}
        if why is not None:
            status["reason"] = why
        if router.end_time is not None:
            status["end_time"] = router.end_time
        body = msgspec.json.encode(status)
        exchange.respond(200 if why is None else 503, body, headers=id_headers(exchange.path, request_id))

    def _cards(self, identity: Identity) -> list[Json]:
        cards = self._router.models.cards(identity.limits.models)
        return [{"created": self._created, **card} for card in cards]

    def _model(self, exchange: Exchange, identity: Identity) -> bytes:
        wanted = routes.model_id(exchange.path)
        for card in self._cards(identity):
            if card["id"] == wanted:
                return msgspec.json.encode(card)
        self._router.models.serving(wanted, identity.limits.models)
        raise HttpError(403, f"this key may not use the model {wanted!r}", code="model_not_allowed")

    # Decisions

    async def _decisions(self, exchange: Exchange, identity: Identity) -> list[Json]:
        asked = parse_qs(exchange.query)
        limit = asked.get("limit", ["20"])[-1]
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= MOST:
            raise HttpError(400, f"`limit` must be a whole number from 1 to {MOST}, not {limit[:20]!r}")
        query = {
            "request_id": asked.get("request_id", [None])[-1],
            "user": None if identity in (RUN, ANYONE) else identity.name,
            "limit": int(limit),
        }
        found: list[Json] = self.snapshot(query)["decisions"]
        if self._others is not None:
            for other in await self._others(query):
                found += other["decisions"]
        found.sort(key=lambda entry: -entry["time"])
        return found[: int(limit)]

    # Figures

    def snapshot(self, query: Json | None = None) -> Json:
        """This process's own figures as plain data, for another relay; with a `query` its decisions."""
        if query:
            return {"decisions": self._router.ring.find(**query)}
        gauges = {gauge.name: gauge.snapshot() for gauge in self.gauges()}
        return {"metrics": self._router.metrics.snapshot(), "gauges": gauges}

    async def metrics_text(self, *, private: bool = True, vllm: bool = False) -> str:
        others = await self._others({}) if self._others is not None else ()
        metrics, gauges = self._router.metrics, self.gauges()
        if others:
            metrics = Metrics()
            metrics.merge(self._router.metrics.snapshot())
        for other in others:
            metrics.merge(other["metrics"])
            for gauge in gauges:
                gauge.merge(other["gauges"].get(gauge.name, ()))
        return metrics.render(gauges, private=private, vllm=vllm)

    def gauges(self) -> list[Gauge]:
        """Figures of this moment."""
        router = self._router
        found = [
            Gauge(
                "hpcserve_router_ready",
                "1 while requests are taken.",
                {(): int(not router.unavailable())},
                over="max",
            ),
            Gauge("hpcserve_router_in_flight", "Requests in flight.", {(): router.in_flight}),
            Gauge(
                "hpcserve_router_upstream_connections",
                "Open connections to workers.",
                {(): router.pool.open_connections},
            ),
            Gauge(
                "hpcserve_router_info",
                "Version, policy and engine.",
                {
                    (
                        ("version", __version__),
                        ("policy", router.config.policy),
                        ("engine", router.config.engine),
                    ): 1
                },
                over="max",
            ),
            *self._workers(),
            *_process(),
        ]
        for name, (text, values) in router.admission.gauges().items():
            found.append(Gauge(name, text, values))
        queued = next((g for g in found if g.name == "hpcserve_router_queue_requests"), None)
        if queued is not None:
            total = sum(queued.values.values())
            found.append(Gauge("hpcserve_router_queued", "Requests waiting for room.", {(): total}))
        for name, value in router.residency.stats().items():
            text = "Size of the index of KV caches, by what it counts; the same news reach every process."
            found.append(_index(name, value, text))
        return _joined(found)

    def _workers(self) -> list[Gauge]:
        loads = ("in_flight", "prefill_tokens", "kv_tokens")
        state = Gauge(
            "hpcserve_router_worker_state",
            "1 for a worker's state: up, breaker_open (also for some seconds after a restart), or probing.",
            over="max",
        )
        in_flight = Gauge("hpcserve_router_worker_in_flight", "Legs in flight, by worker.")
        # Totals over all processes, which each of them reads off the same board.
        load = {
            name: Gauge(
                f"hpcserve_router_worker_load_{name}", f"Load placed on a worker: {name}.", over="max"
            )
            for name in loads[1:]
        }
        engine = {
            name: Gauge(f"hpcserve_router_engine_{name}", text, over="max")
            for name, text in (
                ("running", "Requests an engine runs, as it says."),
                ("waiting", "Requests in an engine's own queue, as it says."),
                ("kv_usage", "Part of an engine's KV cache in use, 0 to 1."),
            )
        }
        transfer = {
            "transferred_bytes": Gauge(
                "hpcserve_router_kv_transfer_bytes_total",
                "KV bytes a worker pulled from others.",
                over="max",
                kind="counter",
            ),
            "transfer_seconds": Gauge(
                "hpcserve_router_kv_transfer_seconds_total",
                "Time a worker's KV transfers took.",
                over="max",
                kind="counter",
            ),
        }
        now = asyncio.get_running_loop().time()
        for worker in self._router.table.all():
            labels: Labels = (("worker", worker.name), ("role", worker.role))
            in_flight.values[labels] = worker.in_flight
            state.values[(*labels, ("state", _STATES[worker.breaker.state(now)]))] = 1
            for name, gauge in load.items():
                gauge.values[labels] = getattr(worker.load, name)
            if worker.facts is not None:
                for name, gauge in (engine | transfer).items():
                    gauge.values[labels] = getattr(worker.facts, name)
        return [in_flight, state, *load.values(), *engine.values(), *transfer.values()]


_STATES = {"closed": "up", "open": "breaker_open", "half-open": "probing"}
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _process() -> list[Gauge]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * _PAGE
    return [
        Gauge("hpcserve_router_processes", "Router processes that gave these figures.", {(): 1}),
        Gauge(
            "hpcserve_router_process_cpu_seconds_total",
            "Processor time of all router processes.",
            {(): used.ru_utime + used.ru_stime},
            kind="counter",
        ),
        Gauge("hpcserve_router_process_resident_memory_bytes", "Their memory.", {(): resident}),
        Gauge(
            "hpcserve_router_process_open_fds", "Their open files.", {(): len(os.listdir("/proc/self/fd"))}
        ),
    ]


def _index(name: str, value: float, text: str) -> Gauge:
    return Gauge("hpcserve_router_kv_index_entries", text, {(("what", name),): value}, over="max")


def _joined(gauges: list[Gauge]) -> list[Gauge]:
    """One gauge per name, its values together."""
    found: dict[str, Gauge] = {}
    for gauge in gauges:
        first = found.setdefault(gauge.name, gauge)
        if first is not gauge:
            first.values.update(gauge.values)
    return list(found.values())
