"""The usual request, answered by callbacks: it wants one stream of text, and need not wait.

Tasks, futures and timers cost more than all that the router has to decide. So a request that can be sent to a
worker at once, once it is whole, goes there as a Flight. Any other one, or one whose flight fails, is
answered by a task as `app.py` and `runner.py` do; nothing is decided here that is not decided there in the
same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..http.compiled import compiled as compiled_module
from ..http.connection import Connection
from ..http.errors import HttpError
from ..http.exchange import Exchange
from ..http.heads import heads
from . import call as calls
from . import routes
from .call import Call, Raw
from .disaggregated import needs_local_prefill
from .flight import Flight
from .pair_flight import PairFlight
from .stream.asked import ask, count
from .stream.pumping import Pumping, compiled

if TYPE_CHECKING:
    from ..engines.base import Engine
    from .app import Router
    from .workers import Worker

log = logging.getLogger(__name__)

_EVERY = 1.0
"""Seconds between two looks at flights without a first byte, where they may wait for four of them."""
_ROUTES = {route.path: route for route in (routes.CHAT, routes.COMPLETIONS)}
_TRUE = msgspec.Raw(b"true")
_ONE = msgspec.Raw(b"1")
_TELLING = ("kv_transfer_params", "ec_transfer_params", "vllm_xargs")
"""Members that the task looks into."""


def lane(path: FastPath) -> Any | None:
    """The compiled Lane; None where it was not compiled."""
    known = heads()
    if known is None:
        return None
    module = None
    for name in ("stream.shapes", "stream.answer", "known", "kv.marks", "reading", "express", "lane"):
        module = compiled_module(f"router.{name}", "each request")
        if module is None:
            return None
    return None if module is None else module.Lane(path, known)


class FastPath:
    """One per router process."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.flights: set[Flight] = set()
        self.pump: Pumping | None = None
        self.lane: Any | None = None
        """The compiled way; None: there is none."""
        self.whole: Callable[[Connection, bytes], bool] = lambda wire, data: False
        """See `http.host.Express`."""
        self._timer: asyncio.TimerHandle | None = None

    def _start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.router.runner.start()
        module = compiled()
        if module is not None:
            self.pump = Pumping(module, self.loop)
        self.lane = lane(self)
        if self.lane is not None:
            self.whole = self.lane.whole
        self._watch()

    def quick(self, exchange: Exchange) -> bool:
        """Answer this request, which came whole; False: nothing was done about it, and a task must."""
        taken = self.take(exchange)
        if taken:
            self.router.requests += 1
        return taken

    def take(self, exchange: Exchange) -> bool:
        """Answer this request, which is whole and was counted; False: nothing was done about it."""
        route = _ROUTES.get(exchange.path)
        if route is None or exchange.method != "POST" or self.router.state != "ready":
            return False
        if self.router.admission.queue.waiting:
            # It would have to wait as well.
            return False
        if self._timer is None:
            self._start()
        if self.lane is not None and self._express(exchange):
            return True
        try:
            flight = self._flight(exchange, route)
        except (HttpError, RecursionError):
            # It is found again, and told to the client, by the task.
            return False
        except Exception:
            log.exception("the fast path failed; a task answers")
            return False
        if flight is None:
            return False
        flight.start()
        return True

    def _express(self, exchange: Exchange) -> bool:
        try:
            return bool(self.lane is not None and self.lane.take(exchange))
        except Exception:
            log.exception("the compiled way failed")
            return False

    def learn(self, data: bytes, exchange: Exchange) -> None:
        if self.lane is not None:
            self.lane.learn(data, exchange)

    def _flight(self, exchange: Exchange, route: routes.Route) -> Flight | None:
        """A flight that was let in; None where only a task can answer. Raises HttpError, RecursionError."""
        router = self.router
        engine = router.engine
        body = exchange.whole()
        if not engine.can_resume or len(body) > router.config.max_body:
            return None
        identity = router.keyring.identify(exchange)
        fields = calls.fields(exchange, body)
        if not _usual(fields, engine.router_members) or exchange.header(b"x-hpcserve-explain") is not None:
            return None
        model = calls.value(fields, "model")
        if model is not None and not isinstance(model, str):
            return None
        name, serving = router.models.serving(model, identity.limits.models)
        identity.check_model(name)
        if not serving.answering:
            return None
        prefill: Sequence[Worker] = ()
        if serving.disaggregated:
            prefill = serving.with_role("prefill")
            if not prefill or _obstacle(engine, fields) is not None:
                return None
        call = Call(
            exchange=exchange, route=route, request_id=calls.request_id(exchange),
            arrived=self.loop.time(), body=body, fields=fields, model=name, streams=True,
            serving=serving, job_key=router.config.job_key, user=identity.name,
        )  # fmt: skip
        demand = router.prompts.demand(call)
        router.runner.check_walltime(call, demand)
        names = engine.names_tokens(chat=route is routes.CHAT)
        asked = ask(fields) if names else count(fields)
        bodies = router.admission.bodies
        if not bodies.take(len(body)):
            return None
        ticket = router.admission.admit(identity, demand, model=name)
        entered = False
        try:
            entered = ticket.enter()
        finally:
            if not entered:
                bodies.give_back(len(body))
        if not entered:
            return None
        call.ticket = ticket
        router.account.let_in(ticket, identity.name)
        kind = PairFlight if prefill and engine.paired else Flight
        return kind(self, call, demand, asked, ticket, prefill)

    def _watch(self) -> None:
        now = self.loop.time()
        for flight in [flight for flight in self.flights if flight.deadline <= now]:
            flight.expire()
        every = min(_EVERY, self.router.config.first_byte_timeout / 4)
        self._timer = self.loop.call_later(every, self._watch)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.pump is not None:
            self.pump.close()


def _obstacle(engine: Engine, fields: Raw) -> str | None:
    """Why a prefill and a decode worker can't answer this as they answer others."""
    if engine.paired:
        return engine.pair_obstacle(lambda name: calls.value(fields, name))
    return needs_local_prefill(fields)


def _usual(fields: Raw, refused: Sequence[str]) -> bool:
    """A stream of one answer to one prompt, with nothing in it that the task must look into or refuse."""
    if fields.get("stream") != _TRUE or fields.get("n", _ONE) != _ONE or "use_beam_search" in fields:
        return False
    if not fields.keys().isdisjoint(refused):
        return False
    for name in _TELLING:
        if name in fields:
            return False
    prompt = fields.get("prompt")
    if prompt is None:
        return True
    start = bytes(memoryview(prompt)[:2])
    return start[:1] == b'"' or start[1:].isdigit()
