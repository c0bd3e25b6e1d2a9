"""Proof that a replica works: one real generation, and for prefill and decode that KV bytes moved.

An open port and a green health check say nothing about the way between two engines: a wrong network
device lets the decode engine compute every prompt again, silently.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ...engines.base import Engine
from ...errors import EngineError, JobError, KVPathError
from ..calls import CallFailed, Calls

PROMPT_TOKENS = 320
"""Several KV blocks also where a block has 128 tokens, as in vLLM on the CPU."""
_ANSWER_TOKENS = 4
_REQUEST_TIMEOUT = 120.0
_METRICS_TIMEOUT = 10.0
_METRICS_LAG = 5.0
"""Seconds until a transfer must show in the metrics; vLLM updates them with its next step."""
_HINT = (
    "look for UCX and NIXL lines in both engines' logs; `network` of the site names the fabric,"
    " and `hpcserve logs --role decode` shows them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A worker that can be asked: a replica, or one of its data-parallel ranks."""

    name: str
    replica: str
    url: str
    generation: int
    ports: Mapping[str, int] = field(default_factory=dict)
    machine: str
    """Equal for two replicas on one machine."""
    rank: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """What tells the API which rank is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What one generation showed. `bytes` is None when the engine can't count them."""

    seconds: float
    bytes: float | None = None
    error: JobError | None = None


def pairs_to_prove(
    prefills: Sequence[Target], decodes: Sequence[Target], unproven: Collection[str]
) -> list[tuple[Target, Target]]:
    """Pairs such that each unproven worker is in one, and each class of pairs (one machine, or two) too.

    With everything proven but one replica, that is one pair.
    """
    pairs: list[tuple[Target, Target]] = []
    if not prefills or not decodes:
        return pairs
    for turn in range(max(len(prefills), len(decodes))):
        prefill, decode = prefills[turn % len(prefills)], decodes[turn % len(decodes)]
        done = {target.name for pair in pairs for target in pair}
        if {prefill.name, decode.name} & (set(unproven) - done):
            pairs.append((prefill, decode))
    if {target.name for target in (*prefills, *decodes)} <= set(unproven):
        # The first time, the classes count as well: shared memory may work where the network fails.
        covered = {prefill.machine == decode.machine for prefill, decode in pairs}
        for prefill in prefills:
            for decode in decodes:
                if (same := prefill.machine == decode.machine) not in covered:
                    covered.add(same)
                    pairs.append((prefill, decode))
    return pairs


class Prover:
    """Sends real requests straight to engines; each method is one try."""

    def __init__(self, engine: Engine, calls: Calls, *, served_name: str, max_model_len: int | None) -> None:
        self._engine = engine
        self._calls = calls
        self._served_name = served_name
        self._tokens = min(PROMPT_TOKENS, (max_model_len or PROMPT_TOKENS * 2) - 2 * _ANSWER_TOKENS)
        # Bytes are counted per decode engine, and a test must not wait behind another: one at a time.
        self._locks: dict[str, asyncio.Lock] = {}

    async def alone(self, target: Target) -> Proof:
        """One generation on one replica."""
        started = time.monotonic()
        try:
            await self._complete(target, self._body())
        except CallFailed as error:
            failure = EngineError(
                f"{target.name} does not answer a test request: {error}",
                hint=f"`hpcserve logs --role {target.name.partition('-')[0]}` shows its log",
            )
            return Proof(seconds=time.monotonic() - started, error=failure)
        return Proof(seconds=time.monotonic() - started)

    async def pair(self, prefill: Target, decode: Target) -> Proof:
        """One generation over a prefill and a decode replica; an error when no KV bytes arrived.

        Each call has a prompt of its own, which no cache knows from an earlier try.
        """
        # All tasks take the prefill lock first, so they can't wait for each other in a circle.
        async with self._lock(prefill), self._lock(decode):
            started = time.monotonic()
            try:
                moved = await self._two_legs(prefill, decode)
            except (CallFailed, KVPathError) as error:
                failure = KVPathError(
                    f"no KV cache passes from {prefill.name} to {decode.name}: {error}", hint=_HINT
                )
                return Proof(seconds=time.monotonic() - started, error=failure)
            return Proof(seconds=time.monotonic() - started, bytes=moved)

    def _lock(self, target: Target) -> asyncio.Lock:
        return self._locks.setdefault(target.name, asyncio.Lock())

    async def _two_legs(self, prefill: Target, decode: Target) -> float | None:
        counts = prefill if self._engine.kv_counted_by == "prefill" else decode
        before = await self._received(counts)
        await (self._at_once if self._engine.paired else self._in_turn)(prefill, decode)
        if before is None:
            return None
        deadline = time.monotonic() + _METRICS_LAG
        while True:
            after = await self._received(counts)
            if after is not None and after > before:
                return after - before
            if time.monotonic() > deadline:
                if counts is prefill:
                    raise KVPathError(f"{decode.name} answered, but {prefill.name} counted no KV bytes")
                raise KVPathError(
                    f"{decode.name} answered, but counted no KV bytes: it computed the prompt itself"
                )
            await asyncio.sleep(0.1)

    async def _in_turn(self, prefill: Target, decode: Target) -> None:
        body = self._body()
        leg = await self._complete(prefill, self._engine.prefill_request(body))
        try:
            request = self._engine.decode_request(body, leg)
        except KeyError:
            raise KVPathError(f"{prefill.name} kept no KV blocks of the test prompt") from None
        await self._complete(decode, request)

    async def _at_once(self, prefill: Target, decode: Target) -> None:
        first, second = self._engine.pair_requests(self._body(), url=prefill.url, ports=prefill.ports)
        why: list[str] = []
        try:
            async with asyncio.TaskGroup() as legs:
                # What prefill answers need not be a text: that it does is what counts.
                url = f"{prefill.url}/v1/completions"
                legs.create_task(self._calls.json("POST", url, first, seconds=_REQUEST_TIMEOUT))
                legs.create_task(self._complete(decode, second))
        except* CallFailed as failed:
            why += map(str, failed.exceptions)
        if why:
            raise CallFailed("; ".join(why))

    async def _received(self, target: Target) -> float | None:
        status, data = await self._calls.fetch(
            "GET", target.url + self._engine.metrics_path, seconds=_METRICS_TIMEOUT
        )
        if status != 200:
            raise CallFailed(f"{target.name} answered {status} on {self._engine.metrics_path}")
        return self._engine.kv_bytes_received(data.decode("utf-8", "replace"), target.rank)

    async def _complete(self, target: Target, body: dict[str, object]) -> dict[str, object]:
        url = f"{target.url}/v1/completions"
        answer = await self._calls.json("POST", url, body, seconds=_REQUEST_TIMEOUT, headers=target.headers)
        if not answer.get("choices"):
            raise CallFailed(f"{url} gave an answer without choices")
        return answer

    def _body(self) -> dict[str, object]:
        # Token ids give a known length with any tokenizer, and random ones miss every prefix cache.
        prompt = [10 + secrets.randbelow(240) for _ in range(self._tokens)]
        return {
            "model": self._served_name,
            "prompt": prompt,
            "max_tokens": _ANSWER_TOKENS,
            "temperature": 0,
            "stream": False,
            # What a model says to such a prompt can be nothing, and then TensorRT-LLM hands no KV over.
            "ignore_eos": True,
        }
