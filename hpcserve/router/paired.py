"""The request whose two legs run at once: prefill and decode are told of each other, and meet.

The prefill worker's answer only says how it went. What decode workers can't do is compute a prompt alone, so
when there is no other pair to ask, the client hears why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

import msgspec
from msgspec.structs import replace

from ..engines.base import Engine
from ..http.errors import HttpError
from ..http.response import UpstreamResponse
from .call import Call
from .demand import Demand
from .disaggregated import PREFILL_ANSWER_MAX
from .legs import (
    FAILED,
    PREFILL_FAILED,
    Collected,
    Delivery,
    EngineAnswer,
    LegFailure,
    Legs,
    Onward,
    Request,
    no_worker,
)
from .metrics import Metrics
from .placement.decision import Decision
from .placement.placer import Placer
from .stream.asked import Fields, value
from .workers import Worker


class _Heard(Onward):
    """Passes an answer on, and knows its status."""

    status = 0

    async def deliver(self, response: UpstreamResponse, first: bytes) -> None:
        self.status = response.status
        await super().deliver(response, first)


class Pairs:
    """Runs requests over a prefill and a decode worker at once."""

    def __init__(self, legs: Legs, engine: Engine, metrics: Metrics, placer: Placer) -> None:
        self._legs = legs
        self._engine = engine
        self._metrics = metrics
        self._placer = placer

    async def run(
        self,
        call: Call,
        target: str,
        body: Fields,
        demand: Demand,
        delivery: Delivery,
        *,
        request_id: str | None = None,
        avoid: Collection[Worker] = (),
        failure: LegFailure | None = None,
    ) -> Decision:
        """As `TwoLegs.run`."""
        obstacle = self._engine.pair_obstacle(lambda name: value(body, name))
        if obstacle is not None:
            raise HttpError(
                400,
                f"{obstacle} needs an engine that computes prompt and answer; this run has prefill and decode"
                " replicas",
                code="not_available",
            )
        whole = Request(
            target=target,
            headers=call.engine_headers(request_id=request_id, encoded=True),
            body=b"",
            streams=call.streams,
            demand=demand,
        )
        gone: set[Worker] = set(avoid)
        doubted: set[Worker] = set()
        first = 0
        if failure is not None:
            _blame(failure, call.decisions[-1], gone, doubted)
            first = 1
        for attempt in range(first, call.attempts(self._legs.attempts)):
            decision = self._place(call, demand, gone, doubted)
            if decision is None:
                break
            if attempt:
                call.retries += 1
                self._legs.retried("pair")
            call.placed(decision)
            self._placer.placed(decision, demand, asyncio.get_running_loop().time())
            try:
                await self._send(whole, body, decision, delivery)
            except LegFailure as error:
                if delivery.started:
                    raise
                failure = error
                _blame(error, decision, gone, doubted)
            else:
                return decision
        if failure is not None:
            raise failure.http_error()
        raise no_worker("decode" if call.serving.with_role("prefill") else "prefill")

    def _place(
        self, call: Call, demand: Demand, gone: Collection[Worker], doubted: Collection[Worker]
    ) -> Decision | None:
        """A pair of workers that are not in `gone`, and, if there are others, not in `doubted`."""
        chosen: list[list[Worker]] = []
        for role in ("decode", "prefill"):
            left = [worker for worker in call.serving.with_role(role) if worker not in gone]
            chosen.append([worker for worker in left if worker not in doubted] or left)
        answering, prefill = chosen
        if not prefill:
            return None
        now = asyncio.get_running_loop().time()
        return self._placer.place(demand, answering=answering, prefill=prefill, now=now)

    async def _send(self, whole: Request, body: Fields, decision: Decision, delivery: Delivery) -> None:
        """Both legs, to the end of both. Whatever ends this early closes both connections, which makes the
        engines stop. Raises LegFailure, EngineAnswer."""
        worker = decision.prefill
        assert worker is not None, "a pair was asked for"
        requests = self._engine.pair_requests(body, url=worker.url, ports=worker.ports)
        prefill_body, decode_body = map(msgspec.json.encode, requests)
        patience = self._legs.first_byte_timeout
        answer, heard = Collected(PREFILL_ANSWER_MAX), _Heard(delivery)
        prefill = asyncio.create_task(
            self._legs.send(
                replace(whole, body=prefill_body), worker, decision, answer,
                first_byte_timeout=patience, failed=PREFILL_FAILED,
            )
        )  # fmt: skip
        # While prefill is silent, decode must be; so its own patience begins where prefill's ends.
        decode = asyncio.create_task(
            self._legs.send(
                replace(whole, body=decode_body), decision.answering, decision, heard,
                first_byte_timeout=2 * patience if whole.streams else None, failed=FAILED,
            )
        )  # fmt: skip
        try:
            await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
            if prefill.done():
                # Once decode writes, the KV is there. Before that, prefill tells better why it does not.
                if not delivery.started and not (decode.done() and decode.exception() is None):
                    _check(prefill, answer)
                await decode
            else:
                decode.result()
            if heard.status >= 400:
                # A refusal: prefill may wait for a partner that won't come.
                return
            self._metrics.kv_legs.add(("result", "transferred"))
            # The client has its answer, and may leave.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((prefill,))
        finally:
            for leg in (prefill, decode):
                leg.cancel()
            await asyncio.gather(prefill, decode, return_exceptions=True)


def _blame(failure: LegFailure, decision: Decision, gone: set[Worker], doubted: set[Worker]) -> None:
    """Whom to ask no more (`gone`), or only where there is nobody else (`doubted`)."""
    if failure.fault not in ("status", "stream"):
        gone.add(failure.worker)
    elif decision.prefill is not None:
        # It answers, and says that the KV did not pass: either of the two may be why.
        doubted |= {decision.prefill, decision.answering}


def _check(prefill: asyncio.Task[None], answer: Collected) -> None:
    """Raises what the prefill leg, which is done, failed with: then the decode leg waits for nothing."""
    prefill.result()
    if answer.status >= 400:
        raise EngineAnswer(answer.status, answer.headers, answer.body)
