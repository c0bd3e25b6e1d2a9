"""A request that was let in, on its way over workers to the end of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any, Protocol

import msgspec

from ..engines.base import Engine
from ..http.client import Pool
from ..http.errors import HttpError
from ..http.response import UpstreamResponse
from . import choices, fanout
from .call import Call
from .choices import Choice
from .config import RouterConfig
from .demand import Demand
from .disaggregated import TwoLegs
from .legs import Delivery, LegFailure, Legs, Request, no_worker
from .metrics import Metrics
from .migration.migrator import Attempt, Migrator
from .migration.resumed import Client
from .paired import Pairs
from .placement.decision import Decision
from .placement.placer import Placer
from .relay import ClientDelivery, PromptIds
from .stall import StallWatch
from .stream.asked import Asked, Fields, ask, count, splice, value
from .workers import Worker, WorkerTable

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PROMPTS_MAX = 8 * 1024 * 1024
"""Bytes of prompts' token ids that one process keeps; a stream without them has its prompt tokenized again
when it must go on elsewhere."""

OnPromptIds = Callable[[Demand, bytes], None]


class _Stream(Delivery, Client, Protocol):
    def expect(self, asked: Asked, on_prompt_ids: PromptIds | None) -> None: ...


class Runner:
    """Runs requests on workers. One per router process."""

    def __init__(
        self,
        config: RouterConfig,
        table: WorkerTable,
        pool: Pool,
        placer: Placer,
        engine: Engine,
        metrics: Metrics,
        suspect: Callable[[Worker, str], None],
        *,
        on_prompt_ids: OnPromptIds | None = None,
    ) -> None:
        """`on_prompt_ids` is told the ids of each stream's prompt, as in a JSON array, without brackets."""
        self._placer = placer
        self._engine = engine
        self._metrics = metrics
        self._on_prompt_ids = on_prompt_ids
        self.legs = Legs(config, pool, metrics, suspect, placer)
        self._two_legs: TwoLegs | Pairs = (
            Pairs(self.legs, engine, metrics, placer)
            if engine.paired
            else TwoLegs(config, table, self.legs, engine, metrics, placer)
        )
        self._migrator = Migrator(engine, pool, metrics, config.job_key)
        self._stall = StallWatch(table, pool, engine, config.job_key, suspect)
        self._prompts = 0
        self.end_time: float | None = None
        """When the walltime ends, as a Unix time."""

    async def close(self) -> None:
        await self._stall.close()

    async def run(self, call: Call, demand: Demand, delivery: ClientDelivery) -> Json | None:
        """Answer `call`; returns what the engine counted, where it says so.

        Raises HttpError and EngineAnswer before the answer's start. What breaks after it is ended here.
        """
        self.start()
        self.check_walltime(call, demand)
        path = call.exchange.path
        generates = path in (CHAT, COMPLETIONS)
        two_legs = generates and call.serving.disaggregated
        if not two_legs and not (generates and call.streams):
            work = self._one_leg(call, call.exchange.target, call.body, demand, delivery, ())
            return await _to_the_end(work, delivery)
        body: Fields = dict(call.fields or {})
        if two_legs:
            if not call.serving.with_role("decode"):
                raise no_worker("decode")
            parts = self._split(body, chat=path == CHAT)
            if len(parts) > 1:
                return await self._fan_out(call, demand, parts)
        return await _to_the_end(self._generate(call, call.body, body, demand, delivery), delivery)

    def start(self) -> None:
        """Watch workers from now on; called again it does nothing."""
        self._stall.start()

    async def go_on(
        self,
        call: Call,
        demand: Demand,
        delivery: ClientDelivery,
        asked: Asked,
        body: Fields,
        failure: LegFailure,
    ) -> Json | None:
        """As `run()`, for a stream whose leg to an engine, asked with `body`, has failed already."""
        return await _to_the_end(self._go_on(call, demand, delivery, asked, body, failure), delivery)

    async def _go_on(
        self,
        call: Call,
        demand: Demand,
        delivery: ClientDelivery,
        asked: Asked,
        body: Fields,
        failure: LegFailure,
    ) -> None:
        attempt = partial(self._attempt, call, None)
        if not delivery.started:
            try:
                await attempt(call.exchange.target, body, demand, delivery, (), failure=failure)
                return
            except LegFailure as another:
                failure = another
        await self._migrate(call, body, demand, delivery, asked, failure, attempt)

    async def take_over(
        self,
        call: Call,
        demand: Demand,
        delivery: ClientDelivery,
        worker: Worker,
        failed: frozenset[int],
        response: UpstreamResponse,
    ) -> Json | None:
        """As `run()`, for a request that `worker` has answered with no stream of text. Statuses in `failed`
        are failures of the worker."""
        whole = Request(target="", headers=[], body=b"", streams=call.streams, demand=demand)
        work = self.legs.send(
            whole, worker, call.decisions[-1], delivery, first_byte_timeout=None, failed=failed,
            response=response,
        )  # fmt: skip
        return await _to_the_end(work, delivery)

    @staticmethod
    def _split(body: Fields, *, chat: bool) -> list[Choice]:
        prompt = body.get("prompt")
        start = bytes(memoryview(prompt)[:2]) if isinstance(prompt, msgspec.Raw) else b""
        several = not chat and start[:1] == b"[" and not start[1:].isdigit()
        if not several and (value(body, "n") in (None, 1)):
            return [Choice(index=0, first_of_prompt=True, body=body)]
        whole = {name: value(body, name) for name in body}
        return choices.split(whole, chat=chat)

    async def _fan_out(self, call: Call, demand: Demand, parts: list[Choice]) -> Json | None:
        async def one(body: Fields, delivery: Delivery, request_id: str) -> None:
            if isinstance(delivery, fanout.ChoiceStream):
                await self._generate(call, b"", body, demand, delivery, request_id=request_id)
            else:
                await self._two_legs.run(
                    call, call.exchange.target, body, demand, delivery, request_id=request_id
                )

        return await fanout.run(one, call, parts, self._metrics)

    async def _generate(
        self,
        call: Call,
        raw: bytes,
        body: Fields,
        demand: Demand,
        delivery: _Stream,
        *,
        request_id: str | None = None,
    ) -> None:
        """Run one choice; where its stream breaks, go on with it on another worker."""
        asked: Asked | None = None
        kept = 0

        def keep(ids: bytes) -> bool:
            nonlocal kept
            size = self.keep(demand, ids)
            kept += size
            return size > 0

        if call.streams:
            chat = call.exchange.path == CHAT
            asked = ask(body) if self._engine.names_tokens(chat=chat) else count(body)
            delivery.expect(asked, keep)
        attempt = partial(self._attempt, call, request_id)
        try:
            if call.serving.disaggregated:
                body = body if asked is None else {**body, **asked.added}
                await attempt(call.exchange.target, body, demand, delivery, ())
            else:
                raw = raw if asked is None else splice(raw, body, asked.added)
                body = body if asked is None else {**body, **asked.added}
                await self._one_leg(call, call.exchange.target, raw, demand, delivery, ())
        except LegFailure as failure:
            if asked is None or not self._engine.can_resume:
                raise
            await self._migrate(call, body, demand, delivery, asked, failure, attempt)
        finally:
            self.forget(kept)

    async def _attempt(
        self,
        call: Call,
        request_id: str | None,
        target: str,
        body: Fields,
        demand: Demand,
        delivery: Delivery,
        avoid: Collection[Worker],
        *,
        failure: LegFailure | None = None,
    ) -> None:
        if call.serving.disaggregated:
            await self._two_legs.run(
                call, target, body, demand, delivery, request_id=request_id, avoid=avoid, failure=failure
            )
        else:
            raw = msgspec.json.encode(body)
            await self._one_leg(call, target, raw, demand, delivery, avoid, failure=failure)

    async def _migrate(
        self,
        call: Call,
        body: Fields,
        demand: Demand,
        delivery: _Stream,
        asked: Asked,
        failure: LegFailure,
        attempt: Attempt,
    ) -> None:
        """Go on with a stream at another worker. Raises LegFailure where that can't be."""
        if not delivery.started or delivery.stream is None or failure.status == 400:
            raise failure
        await self._migrator.go_on(call, body, demand, delivery, asked, failure, attempt)

    def keep(self, demand: Demand, ids: bytes) -> int:
        """The ids of a stream's prompt, as in a JSON array without brackets: learn from them, and say how
        many bytes may be kept until `forget()`."""
        if self._on_prompt_ids is not None:
            self._on_prompt_ids(demand, ids)
        if self._prompts + len(ids) > _PROMPTS_MAX:
            return 0
        self._prompts += len(ids)
        return len(ids)

    def forget(self, size: int) -> None:
        """A stream has ended for which so many bytes were kept."""
        self._prompts -= size

    async def _one_leg(
        self,
        call: Call,
        target: str,
        body: bytes,
        demand: Demand,
        delivery: Delivery,
        avoid: Collection[Worker],
        *,
        failure: LegFailure | None = None,
    ) -> Decision:
        """Forward a request to one worker, to another one if it fails before its first byte.

        `failure`: what was wrong with the one it was sent to already. Raises HttpError when none could
        answer, and LegFailure when the answer broke after its start.
        """
        request = Request(
            method=call.exchange.method,
            target=target,
            headers=call.engine_headers(),
            body=body,
            streams=call.streams,
            demand=demand,
        )
        tried: set[Worker] = set(avoid)
        if failure is not None:
            tried.add(failure.worker)
        patience = self.legs.first_byte_timeout if call.streams else None
        for attempt in range(0 if failure is None else 1, call.attempts(self.legs.attempts)):
            now = asyncio.get_running_loop().time()
            decision = self._placer.place(demand, answering=call.serving.answering, tried=tried, now=now)
            if decision is None:
                break
            if attempt:
                call.retries += 1
                self.legs.retried("single")
            tried.add(decision.answering)
            self._placer.placed(decision, demand, now)
            call.placed(decision)
            try:
                await self.legs.send(
                    request, decision.answering, decision, delivery, first_byte_timeout=patience
                )
                return decision
            except LegFailure as error:
                if delivery.started:
                    raise
                failure = error
        raise failure.http_error() if failure else no_worker("answering")

    def check_walltime(self, call: Call, demand: Demand) -> None:
        """Raises HttpError 503 for an answer that could not be finished before the run ends."""
        if self.end_time is None:
            return
        answering = call.serving.answering
        if not answering:
            return
        left = self.end_time - time.time()
        quickest = max(worker.rates.decode for worker in answering)
        needed = demand.output_tokens / quickest
        if needed > left:
            raise HttpError(
                503,
                f"the answer would take about {needed:.0f} s, and this run ends in {max(left, 0.0):.0f} s",
                headers=(
                    (b"retry-after", b"%d" % max(1, int(left) + 1)),
                    (b"x-hpcserve-reason", b"walltime"),
                ),
                code="walltime",
            )


Json = dict[str, Any]


async def _to_the_end(work: Awaitable[object], delivery: ClientDelivery) -> Json | None:
    """Await `work`, and end an answer that broke after its start. Returns what the engine counted."""
    try:
        await work
    except LegFailure as failure:
        if not delivery.started:
            raise failure.http_error() from failure
        delivery.break_off(failure)
    except HttpError as error:
        if not delivery.started:
            raise
        delivery.break_off(error)
    except asyncio.CancelledError:
        # Many clients close at `[DONE]`, and vLLM ends the body a moment later.
        if delivery.stream is None or not delivery.stream.done:
            raise
        delivery.finish()
    return delivery.usage
