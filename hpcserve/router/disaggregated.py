"""The two-leg request: the prompt on a prefill worker, the answer on a decode worker.

Whatever goes wrong with the first leg, the decode worker can still compute the prompt itself. That
costs its other requests time, so it is counted and told to the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

import msgspec
from msgspec.structs import replace

from ..engines.base import Engine
from . import handover
from .call import Call
from .config import RouterConfig
from .demand import Demand
from .handover import Handover, Receiving
from .legs import (
    FAILED,
    PREFILL_FAILED,
    UNAVAILABLE,
    Collected,
    Delivery,
    EngineAnswer,
    LegFailure,
    Legs,
    Request,
    no_worker,
)
from .metrics import Metrics
from .placement.decision import Decision
from .placement.placer import Placer
from .stream.asked import Fields, value
from .workers import Worker, WorkerTable

log = logging.getLogger(__name__)

PREFILL_ANSWER_MAX = 64 * 1024 * 1024


class _Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What the prefill leg left, and until when it is good."""

    left: Handover
    decision: Decision
    worker: Worker | None
    """Who keeps its KV; None: the decode worker computes the prompt."""
    stale_at: float
    """Event loop time after which the KV blocks may be freed before decode asks for them."""

    def usable(self, now: float) -> bool:
        # Blocks of an engine that was restarted are gone, and asking for them can crash the asker.
        return now <= self.stale_at and (self.worker is None or not self.worker.gone)


class TwoLegs:
    """Runs requests over a prefill and a decode worker."""

    def __init__(
        self,
        config: RouterConfig,
        table: WorkerTable,
        legs: Legs,
        engine: Engine,
        metrics: Metrics,
        placer: Placer,
    ) -> None:
        self._legs = legs
        self._engine = engine
        self._metrics = metrics
        self._placer = placer
        self._lease = config.kv_lease

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
        """Run one choice of one prompt on workers that are not in `avoid`; returns the placement that worked.

        `failure`: what was wrong with the first worker, where one was asked already. Raises HttpError,
        EngineAnswer, or LegFailure after the start.
        """
        headers = call.engine_headers(request_id=request_id, encoded=True)
        whole = Request(target=target, headers=headers, body=b"", streams=call.streams, demand=demand)
        tried: set[Worker] = set(avoid)
        without_kv: set[Worker] = set()
        """Of those that were tried, the ones that may just not have got their KV."""
        failed_prefill: set[Worker] = set()
        first = 0
        if failure is not None:
            if failure.worker.role == "prefill":
                failed_prefill.add(failure.worker)
            else:
                tried.add(failure.worker)
                first = 1
        prompt: _Prompt | None = None
        patience = self._legs.first_byte_timeout if call.streams else None
        now = asyncio.get_running_loop().time
        attempts = call.attempts(self._legs.attempts)
        for attempt in range(first, attempts):
            answering = call.serving.with_role("decode")
            if not answering:
                break
            alone = bool(without_kv) and tried.issuperset(answering)
            if alone:
                tried -= without_kv
            if prompt is None or not prompt.usable(now()):
                prompt = await self._prefill(call, whole, body, tried, failed_prefill, alone=alone)
                failed_prefill = set()
                if prompt is None:
                    break
                if prompt.left.answer is not None:
                    await prompt.left.deliver(delivery)
                    return prompt.decision
            worker = prompt.decision.answering
            if worker in tried or worker.gone:
                other = self._placer.place(
                    demand, answering=call.serving.with_role("decode"), tried=tried, now=now()
                )
                if other is None:
                    break
                worker = other.answering
            if attempt:
                call.retries += 1
                self._legs.retried("decode")
            tried.add(worker)
            decision = replace(prompt.decision, answering=worker)
            # A decode engine's 500 may be about the KV transfer: worth a second prompt elsewhere.
            failed = FAILED if prompt.worker is not None else UNAVAILABLE
            self._placer.placed(decision, demand, now())
            try:
                receiving = Receiving(delivery, self._engine, worker) if prompt.worker else delivery
                await self._legs.send(
                    replace(whole, body=prompt.left.body), worker, decision, receiving,
                    first_byte_timeout=patience, failed=failed,
                )  # fmt: skip
                return decision
            except LegFailure as error:
                if delivery.started:
                    raise
                failure = error
                if prompt.worker is not None:
                    doubt_giver(error, prompt.worker, now())
                    if self._lacked_kv(error):
                        without_kv.add(worker)
                if error.fault != "connect":
                    # It may have pulled the blocks, and then they are free for other prompts.
                    prompt = None
        raise failure.http_error() if failure else no_worker("decode")

    def _lacked_kv(self, failure: LegFailure) -> bool:
        """Could the worker have answered, had it been asked to compute the prompt itself?"""
        return not self._engine.recomputes and failure.fault in ("status", "reset", "protocol")

    async def _prefill(
        self,
        call: Call,
        whole: Request,
        body: Fields,
        tried: Collection[Worker],
        failed: set[Worker],
        *,
        alone: bool,
    ) -> _Prompt | None:
        """Choose the workers, and compute the prompt where it is computed on a prefill worker, which with
        `alone` it is not. Those that fail are added to `failed`.

        None: no decode worker is left.
        """
        reason = "kv_failed" if alone else needs_local_prefill(body)
        leg = b""
        warning = "no KV blocks came" if alone else None
        if reason is None:
            try:
                leg = msgspec.json.encode(self._engine.prefill_request(body))
            except (TypeError, ValueError, KeyError) as error:
                reason, warning = "unsupported", f"the request has no prefill leg: {error}"
        while True:
            now = asyncio.get_running_loop().time()
            prefill = call.serving.with_role("prefill") if reason is None else []
            decision = self._placer.place(
                whole.demand,
                answering=call.serving.with_role("decode"),
                prefill=[worker for worker in prefill if worker not in failed],
                tried=tried,
                now=now,
            )
            if decision is None:
                return None
            call.placed(decision)
            worker = decision.prefill
            if worker is None:
                if reason is None:
                    reason, warning = self._why_local(bool(prefill), failed)
                return self._local(call, body, decision, reason, warning)
            if len(failed) >= call.attempts(self._legs.attempts):
                reason, warning = "prefill_failed", "no prefill replica answered"
                continue
            if failed:
                call.retries += 1
                self._legs.retried("prefill")
            # Now, not with the second leg: siblings that come meanwhile should meet this prefill's cache.
            self._placer.placed(decision, whole.demand, now)
            answer = Collected(PREFILL_ANSWER_MAX)
            try:
                await self._legs.send(
                    replace(whole, body=leg), worker, decision, answer,
                    first_byte_timeout=self._legs.first_byte_timeout, failed=PREFILL_FAILED,
                )  # fmt: skip
            except LegFailure as failure:
                if call.attempts(self._legs.attempts) == 1:
                    # Computing the prompt on decode would be another try.
                    raise failure.http_error() from failure
                failed.add(worker)
                continue
            return self._take(call, body, decision, worker, answer)

    @staticmethod
    def _why_local(there_are: bool, failed: Collection[Worker]) -> tuple[str, str | None]:
        if failed:
            return "prefill_failed", "no prefill replica answered"
        if not there_are:
            return "no_prefill_worker", "no prefill replica is in rotation"
        return "quicker", None

    def _take(
        self, call: Call, body: Fields, decision: Decision, worker: Worker, answer: Collected
    ) -> _Prompt:
        if answer.status == 429:
            raise EngineAnswer(answer.status, answer.headers, answer.body)
        if answer.status >= 400:
            # Decode is asked alone and has the last word: what it refuses, the client sees in its words.
            return self._local(call, body, decision, "prefill_refused", None)
        try:
            left = handover.read(self._engine, self._metrics, body, answer.body, stream=call.streams)
        except handover.UNREADABLE:
            return self._local(call, body, decision, "no_kv", f"{worker.name} kept no KV blocks")
        return _Prompt(
            left=left,
            decision=decision,
            worker=worker,
            stale_at=answer.arrived + self._lease * 0.5,
        )

    def _local(
        self, call: Call, body: Fields, decision: Decision, reason: str, warning: str | None
    ) -> _Prompt:
        self._metrics.kv_legs.add(("result", "local"), ("reason", reason))
        if warning is not None:
            log.warning("%s; decode computes the prompt of %s", warning, call.request_id)
            told = f"{warning}; the decode replica computed the prompt"
            if told not in call.warnings:
                call.warnings.append(told)
        return _Prompt(
            left=Handover(body=msgspec.json.encode(body)),
            decision=replace(decision, prefill=None),
            worker=None,
            stale_at=float("inf"),
        )


def doubt_giver(failure: LegFailure, prefill: Worker, now: float) -> None:
    """A decode leg failed that pulled its KV from `prefill`."""
    if failure.fault == "reset" and prefill.breaker.state(now) != "closed":
        # Just restarted, and the first to pull from it died.
        prefill.breaker.failed(now)


def needs_local_prefill(body: Fields) -> str | None:
    """Why a request can't use KV from elsewhere: its answer has figures about each prompt token,
    which only the engine that computes the prompt knows; or one engine must hold all its beams."""
    if value(body, "prompt_logprobs") is not None:
        return "prompt_logprobs"
    # In a chat, vLLM takes `echo` for a wish for the prompt's logprobs as well.
    if value(body, "echo") and (
        "messages" in body
        or (value(body, "logprobs") is not None and value(body, "logprobs") is not False)
        or value(body, "top_logprobs") is not None
        or value(body, "max_tokens") == 0
    ):
        return "echo"
    if value(body, "use_beam_search"):
        return "beam_search"
    return None
