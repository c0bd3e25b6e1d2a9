"""A pair's request on the fast path: the decode leg is a flight, and the prefill leg is a task beside it.

As in `paired.py`. What prefill has to say is one short answer, which costs little as a task; the stream comes
from decode.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from .call import Call
from .demand import Demand
from .disaggregated import PREFILL_ANSWER_MAX
from .flight import Flight
from .legs import PREFILL_FAILED, Collected, LegFailure, Request
from .placement.decision import Decision
from .stream.generated import GeneratedStream
from .workers import Worker

if TYPE_CHECKING:
    from .app import Router

log = logging.getLogger(__name__)


class PairFlight(Flight):
    """Ends both legs when one of them fails before the answer begins."""

    __slots__ = ("_partner", "_patience", "_told")

    def _place(self, call: Call, demand: Demand, router: Router) -> None:
        now = call.arrived
        self._partner: asyncio.Task[None] | None = None
        self._patience = router.runner.legs.first_byte_timeout
        self._told = Collected(PREFILL_ANSWER_MAX)
        answering = call.serving.answering
        decision = router.placer.place(demand, answering=answering, prefill=self._prefill, now=now)
        assert decision is not None and decision.prefill is not None and call.fields is not None
        self._decision = decision
        router.placer.placed(decision, demand, now)
        call.placed(decision)
        worker = decision.prefill
        requests = router.engine.pair_requests(
            {**call.fields, **self._asked.added}, url=worker.url, ports=worker.ports
        )
        prefill, decode = map(msgspec.json.encode, requests)
        request = Request(
            target=call.exchange.target,
            headers=call.engine_headers(encoded=True),
            body=prefill,
            streams=True,
            demand=demand,
        )
        leg = router.runner.legs.send(
            request, worker, decision, self._told,
            first_byte_timeout=self._patience, failed=PREFILL_FAILED,
        )  # fmt: skip
        self._partner = self._path.loop.create_task(leg)
        self._partner.add_done_callback(self._met)
        self._ask(decision.answering, decode, now)
        # While prefill is silent, decode must be; so its own patience begins where prefill's ends.
        self.deadline = now + 2 * self._patience

    def _met(self, partner: asyncio.Task[None]) -> None:
        """The prefill leg ended. Once decode writes, the KV is there, and it does not matter how."""
        if partner.cancelled():
            return
        error = partner.exception()
        if self._worker is None or self._streams:
            return
        if isinstance(error, LegFailure):
            self._fall(error)
        elif error is not None:
            log.error("the prefill leg of %s failed", self._call.request_id, exc_info=error)
            self._again()
        elif self._told.status >= 400:
            self._again()

    def expire(self) -> None:
        if self._worker is not None:
            seconds = 2 * self._patience
            self._lose(LegFailure("timeout", self._worker, f"no byte within {seconds:g} s"))

    def _lose(self, failure: LegFailure) -> None:
        self._path.router.runner.legs.note(failure)
        self._fall(failure)

    def _fall(self, failure: LegFailure) -> None:
        """A leg failed, which is noted: a task goes on from here."""
        self._drop()
        self._exchange.uncork()
        stream = None
        if self._streams:
            stream, self._stream, self._streams = self._stream, None, False
        self._landing().after(failure, stream, self._first_at)

    def _give_away(self, worker: Worker, decision: Decision, data: bytes, *, last: bool) -> None:
        if self._status >= 400:
            # A refusal: prefill may wait for a partner that won't come.
            self._part()
        super()._give_away(worker, decision, data, last=last)

    def _complete(self, stream: GeneratedStream) -> None:
        self._path.router.metrics.kv_legs.add(("result", "transferred"))
        super()._complete(stream)

    def _drop(self) -> None:
        self._part()
        super()._drop()

    def _part(self) -> None:
        """End the prefill leg, where it runs: closing its connection makes the engine stop."""
        if self._partner is not None:
            self._partner.cancel()
