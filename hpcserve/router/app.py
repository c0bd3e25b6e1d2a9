"""The endpoint: what is let in, in which order it is looked at, and how each request ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from .. import engines
from ..engines.kv_events.messages import KvMessage
from ..http.client import Pool
from ..http.errors import HttpError
from ..http.exchange import Exchange
from ..http.heads import heads
from . import call as calls
from . import form, refusals, routes
from .account import Account
from .admission.admission import Admission
from .api_delivery import ApiDelivery
from .batches import Batches
from .board import Board
from .call import Call, id_headers
from .config import RouterConfig
from .control import Facts, KVEvents, Reload, State, Table, Totals
from .demand import Demand
from .fast_path import FastPath
from .held import Holders, Only
from .keys.identity import Identity
from .keys.keyring import KeyRing
from .keys.meter import Meter
from .kv.learning import Learning
from .kv.residency import Residency
from .legs import EngineAnswer
from .metrics import Metrics
from .own import Others, Own
from .placement.facts import EngineFacts
from .placement.placer import Placer
from .prompt import Prompts
from .relay import ClientDelivery
from .routes import Route
from .runner import Runner
from .serving import Models, Serving
from .why.ring import Ring
from .workers import Worker, WorkerTable

log = logging.getLogger(__name__)

_kv_message = msgspec.json.Decoder(KvMessage)


class Router:
    """One router process: its workers, its state, and the handler of its server."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        on_suspect: Callable[[Worker, str], None],
        board: Board | None = None,
        others: Others | None = None,
    ) -> None:
        """`others` gives the `snapshot()` of every other relay of this endpoint."""
        self.config = config
        self.board = board or Board()
        self.table = WorkerTable(config.workers, self.board)
        self.models = Models(self.table, config.served_name)
        self.metrics = Metrics()
        self.ring = Ring()
        self.state: State = "ready" if config.workers else "starting"
        self.reason: str | None = None
        self.retry_after: int | None = None
        self.end_time: float | None = None
        self.in_flight = 0
        self.requests = 0
        self.idle = asyncio.Event()
        """Set while nothing is in flight."""
        self.idle.set()
        self.pool = Pool(answers=heads())
        self.keyring = KeyRing(config.api_key, config.keys)
        self.meter = Meter()
        self.admission = Admission(
            config, self.board, table=self.table, meter=self.meter, keyring=self.keyring
        )
        self.residency = Residency(share=others is not None)
        self.learning = Learning(self.residency)
        self.prompts = Prompts((config.served_name,))
        self.account = Account(self.metrics, self.prompts)
        self._holders = Holders(self.pool, config.job_key)
        self.own = Own(self, others)
        self._batches = Batches(config.batch_api, self.pool, config.served_name)
        self.engine = engines.get(config.engine)
        self.placer = Placer(config.policy, self.residency, pairs_only=self.engine.paired)
        self.runner = Runner(
            config, self.table, self.pool, self.placer, self.engine, self.metrics, on_suspect,
            on_prompt_ids=self.learning.put,
        )  # fmt: skip
        self.fast_path = FastPath(self)

    # What the head node and the supervisor say

    def update(self, table: Table) -> None:
        """Take over the head's table and state. Draining is for good."""
        self.admission.start()
        self.table.update(table.workers)
        self.prompts.served = frozenset(self.models.bases)
        self.residency.keep_only({spec.name: spec.generation for spec in table.workers})
        self.end_time = self.runner.end_time = table.end_time
        if self.state != "draining":
            self.state, self.reason, self.retry_after = table.state, table.reason, table.retry_after

    def hear(self, message: Facts | KVEvents | Reload | Totals) -> None:
        """What the supervisor passes on besides the table."""
        match message:
            case Facts(facts=facts):
                self._take_facts(facts)
            case KVEvents(batch=batch):
                try:
                    now = asyncio.get_running_loop().time()
                    self.residency.apply(_kv_message.decode(batch), now=now)
                except ValueError as error:
                    log.error("news about KV caches are not understood: %s", error)
            case Totals(totals=totals):
                self.meter.told(totals)
            case Reload():
                self.keyring.reload()

    def _take_facts(self, told: Mapping[str, Mapping[str, int | float | None]]) -> None:
        now = asyncio.get_running_loop().time()
        for name, figures in told.items():
            worker = self.table.get(name)
            if worker is None:
                continue
            facts = msgspec.convert(figures, EngineFacts)
            if worker.facts is not None:
                worker.rates.learn(worker.facts, facts)
            worker.facts = facts
            if facts.kv_tokens:
                self.residency.capacity(name, facts.kv_tokens)
            self.residency.computed(name, facts.computed_tokens, now=now)

    def drain(self, reason: str) -> None:
        """Take no new requests; those in flight go on."""
        if self.state != "draining":
            self.state, self.reason = "draining", reason

    async def close(self) -> None:
        self.fast_path.close()
        self.learning.close()
        await self.runner.close()
        await self.keyring.close()
        self.admission.close()
        await self.pool.close()

    # The handler

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        request_id = calls.request_id(exchange)
        route = routes.find(exchange.path) or routes.UNKNOWN
        await self.conclude(exchange, route, request_id, self._answer(exchange, route, request_id))

    async def conclude(
        self, exchange: Exchange, route: Route, request_id: str, work: Awaitable[None]
    ) -> None:
        """Await `work`, which answers the request; what it raises is answered here."""
        try:
            await work
        except HttpError as error:
            self._count(error)
            refusals.answer(exchange, request_id, error)
        except EngineAnswer as answer:
            self._pass_on(exchange, request_id, answer)
        except asyncio.CancelledError:
            self.metrics.cancelled.add(("route", route.path))
            raise
        except RecursionError:
            refusals.answer(exchange, request_id, calls.too_deep())
        finally:
            if exchange.owner is None:
                self.account.answered(route.path, exchange.status or 499)

    async def _answer(self, exchange: Exchange, route: Route, request_id: str) -> None:
        if route is routes.HEALTH:
            refusals.check_method(exchange, route)
            self.own.health(exchange, request_id)
            return
        identity = self.keyring.identify(exchange)
        if route is routes.UNKNOWN:
            raise HttpError(404, f"no such route: {exchange.path[:200]}", code="unknown_route")
        if exchange.method == "OPTIONS":
            headers = [(b"allow", refusals.allowed(route)), *id_headers(exchange.path, request_id)]
            exchange.start(204, headers, length=0)
            exchange.finish()
            return
        refusals.check_method(exchange, route)
        if route.kind == "own":
            await self.own.answer(exchange, route, request_id, identity)
            return
        if route.kind == "batch":
            # Also while the endpoint drains: what was answered can still be fetched.
            self.began()
            try:
                await self._batches.answer(exchange, request_id, identity)
            finally:
                self.ended()
            return
        self._check_serving()
        self.began()
        self.requests += 1
        try:
            with self.admission.body(exchange, self.config.max_body) as held:
                arrived = asyncio.get_running_loop().time()
                came_whole = exchange.request_complete
                body = await exchange.body(self.config.max_body)
                held.read(len(body))
                if not came_whole and self.fast_path.take(exchange):
                    return
                await self._serve(exchange, route, request_id, identity, body, arrived)
        finally:
            self.ended()

    def began(self) -> None:
        """One more request is in flight."""
        self.in_flight += 1
        if self.in_flight == 1:
            self.idle.clear()

    def ended(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()

    async def _serve(
        self,
        exchange: Exchange,
        route: Route,
        request_id: str,
        identity: Identity,
        body: bytes,
        arrived: float,
    ) -> None:
        call = self._call(exchange, route, request_id, identity, body, arrived)
        # The state may have changed while the body came in.
        self._check_serving()
        await self._choose_part(call)
        demand = (
            self.prompts.demand(call)
            if route.costs
            else Demand(prompt_tokens=1, output_tokens=0, model=call.model)
        )
        admitting = self.admission.admit(identity, demand, model=call.model, streams=call.streams)
        try:
            async with admitting as ticket:
                self.account.let_in(ticket, identity.name)
                call.ticket = ticket
                delivery = self._delivery(call)
                usage = await self.runner.run(call, demand, delivery)
                self.account.served(call, demand, delivery.inter_token, ticket, usage)
        finally:
            if call.decisions:
                self.account.placed(call)
                self.ring.add(call)

    def _call(
        self,
        exchange: Exchange,
        route: Route,
        request_id: str,
        identity: Identity,
        body: bytes,
        arrived: float,
    ) -> Call:
        """Raises HttpError for a body that can't be placed."""
        fields = calls.fields(exchange, body) if route.body == "json" else None
        streams = False
        model: Any = None
        if fields is not None:
            model, streams = calls.value(fields, "model"), bool(calls.value(fields, "stream"))
            calls.refuse_transfers(fields, self.engine.router_members)
        elif route.body == "multipart":
            kind = exchange.header(b"content-type") or b""
            model = form.field(body, kind, b"model")
            streams = (form.field(body, kind, b"stream") or "").lower() in ("1", "true")
            extra = form.field(body, kind, b"vllm_xargs")
            if extra is not None:
                calls.refuse_transfers({"vllm_xargs": msgspec.Raw(extra.encode())})
        whole: Serving = self.table
        if model is not None and not isinstance(model, str):
            raise HttpError(400, "`model` in the request body must be a string")
        if route.kind == "held" or (route.body == "none" and not model):
            name, serving = self.config.served_name, whole
        else:
            name, serving = self.models.serving(model, identity.limits.models)
            identity.check_model(name)
        return Call(
            exchange=exchange, route=route, request_id=request_id, arrived=arrived, body=body, fields=fields,
            model=name, streams=streams, serving=serving, job_key=self.config.job_key, user=identity.name,
            explains=exchange.header(b"x-hpcserve-explain") in (b"1", b"true"),
        )  # fmt: skip

    async def _choose_part(self, call: Call) -> None:
        """Leave only the worker that knows what the request is about, and refuse what workers of these
        roles can't do."""
        route = call.route
        if call.serving.disaggregated:
            alone = route.disaggregated == "decode" and route.computes_prompt
            if route.disaggregated == "never" or (alone and self.engine.paired):
                raise HttpError(
                    404,
                    f"this run has prefill and decode replicas, and {route.path} needs aggregated ones",
                    code="not_available",
                )
            if alone:
                call.warnings.append("this route runs on one replica; the decode replica computed the prompt")
                self.metrics.kv_legs.add(("result", "local"), ("reason", "route"))
        if route.kind == "held":
            about: Any = routes.held_id(call.exchange.path)
        else:
            about = calls.value(call.fields, "previous_response_id") if route is routes.RESPONSES else None
        if isinstance(about, str) and routes.HELD_ID.fullmatch(about):
            worker = await self._holders.find(about, call.serving.answering)
            if worker is not None:
                call.serving = Only(worker)

    def _delivery(self, call: Call) -> ClientDelivery:
        if call.route in (routes.RESPONSES, routes.MESSAGES):
            return ApiDelivery(call, self.metrics, self._holders)
        return ClientDelivery(call, self.metrics)

    # What is let in

    def unavailable(self) -> str | None:
        """Why the router can't serve; None if it can."""
        if self.state != "ready":
            return self.reason or f"the endpoint is {self.state}"
        return None if self.table.answering else "no replica that writes answers is in rotation"

    def _check_serving(self) -> None:
        why = self.unavailable()
        if why is not None:
            retry = str(self.retry_after if self.retry_after is not None else 5).encode()
            code = self.state if self.state != "ready" else "no_worker"
            raise HttpError(
                503,
                why,
                headers=((b"retry-after", retry), (b"x-hpcserve-reason", code.encode())),
                code=code,
            )

    # How requests end badly

    def _count(self, error: HttpError) -> None:
        if error.status >= 500 or error.status == 401:
            self.metrics.errors.add(("reason", error.code or str(error.status)))
        for name, value in error.headers:
            if name == b"x-hpcserve-reason":
                self.metrics.refused.add(("reason", value.decode("latin-1")))

    def _pass_on(self, exchange: Exchange, request_id: str, answer: EngineAnswer) -> None:
        if exchange.started:
            exchange.abort()
            return
        kept = [header for header in answer.headers if header[0] == b"retry-after"]
        exchange.respond(answer.status, answer.body, headers=[*id_headers(exchange.path, request_id), *kept])

    # What others ask

    def snapshot(self, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """This process's own figures as plain data, for another relay; with a `query` its decisions."""
        return self.own.snapshot(dict(query or {}))

    def stats(self) -> dict[str, Any]:
        """The `stats` message for the head node."""
        return {
            "type": "stats",
            "in_flight": self.in_flight,
            "requests": self.requests,
            "errors": int(self.metrics.errors.total),
            "workers": {worker.name: {"in_flight": worker.in_flight} for worker in self.table.all()},
        }
