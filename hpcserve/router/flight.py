"""One request on the fast path, from its worker's choice to the last byte of its stream."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ..http import client
from ..http.errors import Header, HttpError, UpstreamError
from ..http.exchange import Exchange
from ..http.response import UpstreamResponse
from ..http.upstream import Origin, UpstreamConnection
from .call import Call
from .demand import Demand
from .disaggregated import PREFILL_ANSWER_MAX, doubt_giver
from .landing import Landing
from .legs import LegFailure, failures, refusal
from .placement.decision import Decision
from .relay import count_broken, inter_token, is_stream
from .routes import CHAT
from .stream.asked import Asked, Fields, splice
from .stream.generated import GIVEN_UP, EngineFault, GeneratedStream, given_up
from .stream.pumping import Ride
from .workers import Seat, Worker

if TYPE_CHECKING:
    from .admission.admission import Ticket
    from .app import Router
    from .fast_path import FastPath

log = logging.getLogger(__name__)

NEVER = math.inf


class Flight:
    """Reads the engines' answers, owns the client's exchange, and is a lease of the worker it is on."""

    __slots__ = (
        "_asked", "_call", "_computes", "_connecting", "_connection", "_decision", "_demand", "_ended",
        "_exchange", "_fields", "_first_at", "_fresh", "_headers", "_held", "_kept", "_path", "_pieces",
        "_prefill", "_request", "_ride", "_seat", "_size", "_status", "_stream", "_streams", "_ticket",
        "_worker", "deadline", "since",
    )  # fmt: skip

    def __init__(
        self,
        path: FastPath,
        call: Call,
        demand: Demand,
        asked: Asked,
        ticket: Ticket,
        prefill: Sequence[Worker],
    ) -> None:
        """For a request that was let in; `prefill` are workers that can compute its prompt for others."""
        self._path = path
        self._call = call
        self._exchange: Exchange = call.exchange
        self._demand = demand
        self._asked = asked
        self._ticket = ticket
        self._prefill = prefill
        self._fields: Fields = {}
        self._decision: Decision | None = None
        self._worker: Worker | None = None
        """Who is asked at the moment."""
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._fresh = False
        """The connection was made for this request."""
        self._request: tuple[bytes, ...] = ()
        self._status = self._kept = self._size = 0
        self._headers: list[Header] = []
        self._pieces: list[bytes] = []
        """Of a prefill worker's answer, of `_size` bytes."""
        self._held: list[bytes] = []
        self._stream: GeneratedStream | None = None
        self._streams = False
        """The client's answer has begun."""
        self._first_at = 0.0
        self._computes = self._ended = False
        """The worker still has the prompt to compute; all is over."""
        self._seat: Seat | None = None
        self._ride: Ride | None = None
        """The stream's way on the pump, from its beginning to the end of its worker's answer."""
        self.since = 0.0
        """Event loop time at which the worker was asked."""
        self.deadline = NEVER
        """Of the worker's first byte; NEVER once it came."""

    @property
    def pieces(self) -> int:
        """Pieces of the stream that have come so far."""
        carried = 0 if self._ride is None else self._ride.pieces
        return carried if self._stream is None else carried + self._stream.pieces

    def start(self) -> None:
        """Choose workers, and ask the first."""
        call, demand, router = self._call, self._demand, self._path.router
        router.began()
        self._exchange.owner = self
        self._path.flights.add(self)
        try:
            self._place(call, demand, router)
        except Exception:
            self._crashed()

    def _place(self, call: Call, demand: Demand, router: Router) -> None:
        now = call.arrived
        answering = call.serving.answering
        decision = router.placer.place(demand, answering=answering, prefill=self._prefill, now=now)
        assert decision is not None and call.fields is not None
        self._decision = decision
        router.placer.placed(decision, demand, now)
        call.placed(decision)
        if decision.prefill is None:
            if self._prefill:
                router.metrics.kv_legs.add(("result", "local"), ("reason", "quicker"))
            self._ask(decision.answering, splice(call.body, call.fields, self._asked.added), now)
            return
        self._fields = {**call.fields, **self._asked.added}
        try:
            leg = msgspec.json.encode(router.engine.prefill_request(self._fields))
        except (TypeError, ValueError, KeyError):
            self._again()
            return
        self._ask(decision.prefill, leg, now)

    def _ask(self, worker: Worker, body: bytes, now: float) -> None:
        """Send a request to `worker`, and count it there."""
        decision, router = self._decision, self._path.router
        assert decision is not None
        self._worker = worker
        self.since = now
        self.deadline = now + router.runner.legs.first_byte_timeout
        self._seat = Seat(worker, self._demand, decision)
        self._seat.take(self, now)
        self._computes = worker is decision.prefill or decision.prefill is None
        if self._computes:
            router.placer.prefill_began(worker, decision.uncached_tokens, now)
        headers = [*self._call.engine_headers(encoded=bool(self._prefill)), *worker.headers]
        origin, host, target = client.split(worker.url + self._exchange.target)
        self._request = client.encode("POST", host, target, headers, body)
        connection = router.pool.take(origin)
        self._fresh = connection is None
        if connection is None:
            self.connect(origin)
        else:
            self._connection = connection
            connection.ask(self._request, self)

    def connect(self, origin: Origin) -> None:
        """Send the request on a new connection."""
        self._connecting = self._path.loop.create_task(self._connect(origin))

    async def _connect(self, origin: Origin) -> None:
        try:
            connection = await self._path.router.pool.connect(origin)
        except UpstreamError as error:
            self._connecting = None
            self.fail(error)
            return
        self._connecting = None
        self._connection = connection
        connection.ask(self._request, self)

    # What the connection to the worker says

    def head(self, status: int, headers: list[Header]) -> None:
        self._status, self._headers = status, headers

    def feed(self, data: bytes) -> None:
        try:
            stream = self._stream
            if self._streams and stream is not None:
                stream.feed(data)
                if stream.steady and self._ride is not None:
                    self._ride.board()
            else:
                self._take(data, last=False)
        except EngineFault as fault:
            self._broke(fault)
        except Exception:
            self._crashed()

    def end(self, last: bytes) -> None:
        self._connection = None
        self._leave_pump()
        try:
            self._take(last, last=True)
        except EngineFault as fault:
            self._broke(fault)
        except Exception:
            self._crashed()

    def fail(self, error: UpstreamError) -> None:
        worker, connection = self._worker, self._connection
        if worker is None:
            return
        if error.fault == "reset" and not self._fresh and connection is not None and not connection.heard:
            # It was closed while nobody used it. A new one decides.
            self._connection, self._fresh = None, True
            self.connect(client.split(worker.url)[0])
            return
        self._connection = None
        self._lose(LegFailure(error.fault, worker, error.message))

    def _broke(self, fault: EngineFault) -> None:
        if (worker := self._worker) is not None:
            self._lose(LegFailure("stream", worker, fault.message, status=fault.status, event=fault.event))

    def _take(self, data: bytes, *, last: bool) -> None:
        """A piece of an answer."""
        worker, decision = self._worker, self._decision
        if worker is None or decision is None:
            return
        first = self.deadline != NEVER
        if first:
            self.deadline = NEVER
            self._request = ()
            if self._status in failures(worker, decision):
                said = refusal(self._status, data)
                self._lose(LegFailure("status", worker, said, status=self._status))
                return
            self._first_byte(worker, decision)
        if worker is decision.prefill:
            self._collect(worker, decision, data, last=last)
        elif first and not is_stream(self._status, self._headers):
            self._give_away(worker, decision, data, last=last)
        else:
            self._pass_on(data, last=last)

    def _first_byte(self, worker: Worker, decision: Decision) -> None:
        """The prompt is computed, or its KV is there."""
        if self._seat is not None:
            self._seat.first_byte()
        if self._computes:
            self._computes = False
            now = self._path.loop.time()
            seconds = now - self.since
            self._path.router.placer.prefill_ended(worker, decision.uncached_tokens, now, seconds=seconds)

    # The prefill worker's answer

    def _collect(self, worker: Worker, decision: Decision, data: bytes, *, last: bool) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size > PREFILL_ANSWER_MAX:
            what = f"the answer is larger than {PREFILL_ANSWER_MAX} bytes"
            self._lose(LegFailure("too-large", worker, what))
            return
        if not last:
            return
        answer = b"".join(self._pieces)
        if GIVEN_UP in answer:
            raise given_up()
        router = self._path.router
        if self._status >= 400 or decision.answering.gone:
            self._again()
            return
        try:
            body = router.engine.decode_request(self._fields, msgspec.json.decode(answer))
        except (KeyError, AttributeError, msgspec.DecodeError):
            self._again()
            return
        router.metrics.kv_legs.add(("result", "transferred"))
        self._leave_worker()
        self._ask(decision.answering, msgspec.json.encode(body), self._path.loop.time())

    def _pass_on(self, data: bytes, *, last: bool) -> None:
        stream, exchange = self._stream, self._exchange
        if stream is None:
            chat = self._call.route is CHAT
            stream = GeneratedStream(self._held.append, self._asked, chat=chat, on_prompt_ids=self.keep)
            self._stream = stream
        if last:
            exchange.cork()
        if data:
            stream.feed(data)
        if last:
            stream.end()
        if not self._streams:
            # An error that comes first can still be another worker's answer.
            if not self._held and not last:
                return
            self._begin(stream)
        if last:
            self._complete(stream)

    def _begin(self, stream: GeneratedStream) -> None:
        """The client's answer begins."""
        call, exchange = self._call, self._exchange
        self._streams = True
        self._first_at = self._path.loop.time()
        self._path.router.metrics.ttft.observe(self._first_at - call.arrived)
        exchange.cork()
        exchange.start(self._status, call.begin(self._headers))
        exchange.write(b"".join(self._held))
        self._held.clear()
        stream.write_to(exchange.write)
        if self._connection is not None:
            exchange.uncork()
            if exchange.congested:
                self._connection.pause()
            if self._path.pump is not None:
                self._ride = Ride(self._path.pump, self._connection, exchange, stream)

    def _complete(self, stream: GeneratedStream) -> None:
        """The client has the whole answer."""
        call, account = self._call, self._path.router.account
        if stream.has_error:
            count_broken(call, self._path.router.metrics, "the engine ended the stream with an error")
        self._leave_worker()
        self._exchange.finish()
        gap = inter_token(stream, self._first_at)
        account.served(call, self._demand, gap, self._ticket, stream.usage)
        self.close(None)
        account.answered(call.route.path, self._exchange.status)

    def keep(self, ids: bytes) -> bool:
        """May the ids of the prompt be kept?"""
        size = self._path.router.runner.keep(self._demand, ids)
        self._kept += size
        return size > 0

    # What others say

    def flow(self, paused: bool) -> None:
        if self._connection is not None:
            (self._connection.pause if paused else self._connection.resume)()

    def client_gone(self) -> None:
        call, router = self._call, self._path.router
        stream = self._stream
        self._drop()
        if stream is not None and stream.done:
            # Many clients close at `[DONE]`, and vLLM ends the body a moment later.
            self._complete(stream)
            return
        router.metrics.cancelled.add(("route", call.route.path))
        self.close(asyncio.CancelledError())
        router.account.answered(call.route.path, self._exchange.status or 499)

    def abort(self, reason: str) -> None:
        """The worker was taken out of rotation, or no longer answers."""
        if self._worker is not None:
            self._lose(LegFailure("gone", self._worker, reason))

    def expire(self) -> None:
        """No byte came in time."""
        if self._worker is not None:
            seconds = self._path.router.runner.legs.first_byte_timeout
            self._lose(LegFailure("timeout", self._worker, f"no byte within {seconds:g} s"))

    def _lose(self, failure: LegFailure) -> None:
        """The worker failed: a task goes on from here."""
        self._path.router.runner.legs.note(failure)
        self._drop()
        self._exchange.uncork()
        stream = None
        if self._streams:
            stream, self._stream, self._streams = self._stream, None, False
        elif self._decision is not None and self._decision.prefill not in (None, failure.worker):
            doubt_giver(failure, self._decision.prefill, self._path.loop.time())
        self._landing().after(failure, stream, self._first_at)

    def _again(self) -> None:
        """Only a task can say what becomes of this: it starts anew."""
        self._drop()
        self._landing().anew()

    def _give_away(self, worker: Worker, decision: Decision, data: bytes, *, last: bool) -> None:
        """The worker answered something that is no stream of text: a task passes it on."""
        response = UpstreamResponse(self._connection)
        response.head(self._status, self._headers)
        if self._connection is not None and not last:
            self._connection.hand_over(response)
            response.feed(data)
        else:
            response.end(data)
        self._leave_worker()
        self._landing().answered(worker, failures(worker, decision), response)

    def _landing(self) -> Landing:
        return Landing(self._path.router, self._call, self._demand, self._asked, self._ticket, self)

    def landed(self) -> None:
        """A task answers from here on, and hears of the client's end."""
        self._exchange.owner = None
        self._connection = None

    def _crashed(self) -> None:
        """Our own fault, while it is being handled."""
        log.exception("%s %s failed", self._exchange.method, self._exchange.path)
        exchange, router = self._exchange, self._path.router
        self._drop()
        exchange.owner = None
        if exchange.started:
            exchange.abort()
        else:
            exchange.fail_with(HttpError(500, "internal error"))
        self.close(RuntimeError())
        router.account.answered(self._call.route.path, exchange.status)

    def _drop(self) -> None:
        """Let go of the worker."""
        connection, self._connection = self._connection, None
        self._leave_pump()
        self._leave_worker()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if connection is not None:
            connection.abort()

    def _leave_pump(self) -> None:
        ride, self._ride = self._ride, None
        if ride is not None:
            ride.end()

    def _leave_worker(self) -> None:
        worker, self._worker = self._worker, None
        seat, self._seat = self._seat, None
        if worker is None or seat is None or self._decision is None:
            return
        self.deadline = NEVER
        seat.leave()
        if self._computes:
            self._computes = False
            now = self._path.loop.time()
            self._path.router.placer.prefill_ended(worker, self._decision.uncached_tokens, now)

    def close(self, error: BaseException | None) -> None:
        """It is over: give back what it held."""
        if self._ended:
            return
        self._ended, self._stream = True, None  # it knows us: a cycle that would wait for the collector
        call, router = self._call, self._path.router
        self._ticket.leave(error)
        router.admission.bodies.give_back(len(call.body))
        router.runner.forget(self._kept)
        router.account.placed(call)
        router.ring.add(call)
        self._path.flights.discard(self)
        router.ended()
