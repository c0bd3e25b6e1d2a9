"""Our own policies in the simulation: the router's own Placer and index, fed as the router feeds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ...router.config import WorkerSpec
from ...router.demand import Demand
from ...router.kv.match import Match
from ...router.kv.residency import Residency
from ...router.placement.decision import Decision
from ...router.placement.facts import EngineFacts
from ...router.placement.placer import Placer
from ...router.placement.policies import POLICIES
from ...router.placement.residency import Residency as Index
from ...router.workers import Worker
from .engine import Job
from .simulate import Router, Setup
from .trace import BLOCK_TOKENS, TraceRequest

EXPECTED_OUTPUT = 256
"""Tokens the router expects of each answer, at first; it learns their mean."""
_WEIGHT = 0.02
_MIX = 0x9E3779B97F4A7C15
"""Spreads small block ids over 64 bits, as the hashes of real prompts are."""
_MASK = (1 << 64) - 1


class Told:
    """An index that believes events, and what was sent for as long as its first token is awaited."""

    def __init__(self) -> None:
        self._cached: dict[str, set[int]] = {}
        self._awaited: dict[str, dict[int, int]] = {}

    def matches(self, chain: Sequence[int], *, now: float) -> Mapping[str, Match]:
        found = {}
        for name, cached in self._cached.items():
            awaited = self._awaited[name]
            count = 0
            for chunk in chain:
                if chunk not in cached and chunk not in awaited:
                    break
                count += 1
            if count:
                found[name] = Match(count)
        return found

    def predict(self, worker: str, demand: Demand, *, now: float) -> None:
        self._cached.setdefault(worker, set())
        awaited = self._awaited.setdefault(worker, {})
        for chunk in demand.chain:
            awaited[chunk] = awaited.get(chunk, 0) + 1

    def computed(self, worker: str, chain: Sequence[int]) -> None:
        """The first token came."""
        awaited = self._awaited[worker]
        for chunk in chain:
            awaited[chunk] -= 1
            if not awaited[chunk]:
                del awaited[chunk]
            self._cached[worker].add(chunk)

    def event(self, worker: str, stored: Sequence[int], removed: Sequence[int]) -> None:
        cached = self._cached.setdefault(worker, set())
        self._awaited.setdefault(worker, {})
        cached.update(stored)
        cached.difference_update(removed)


class Ours:
    """A Placer with the workers' loads counted as leases count them."""

    def __init__(self, setup: Setup, *, policy: str, told: bool) -> None:
        self._told = Told() if told else None
        index: Index
        if self._told is not None:
            index = self._told
        else:
            residency = Residency()
            for number in range(setup.workers):
                residency.capacity(_name(number), setup.engine.blocks * BLOCK_TOKENS)
            index = residency
        self.placer = Placer(policy, index)
        self._workers = [_worker(number, setup) for number in range(setup.workers)]
        self._number = {worker.name: number for number, worker in enumerate(self._workers)}
        self._open: dict[int, tuple[Demand, Decision, float]] = {}
        self._output = float(EXPECTED_OUTPUT)

    def route(self, request: TraceRequest, now: float) -> int:
        demand = Demand(
            prompt_tokens=request.prompt_tokens,
            output_tokens=round(self._output),
            chain=tuple([_chunk(block) for block in request.blocks]),
            chunk_tokens=BLOCK_TOKENS,
            session=request.session,
        )
        decision = self.placer.place(demand, answering=self._workers, now=now)
        assert decision is not None
        self.placer.placed(decision, demand, now)
        worker = decision.answering
        worker.load.add(
            1.0, float(decision.uncached_tokens), float(demand.prompt_tokens + demand.output_tokens)
        )
        self.placer.prefill_began(worker, decision.uncached_tokens, now)
        self._open[id(request)] = (demand, decision, now)
        return self._number[worker.name]

    def first_token(self, job: Job, now: float) -> None:
        demand, decision, sent = self._open[id(job.request)]
        worker = decision.answering
        worker.load.add(0.0, -float(decision.uncached_tokens), 0.0)
        self.placer.prefill_ended(worker, decision.uncached_tokens, now, seconds=now - sent)
        if self._told is not None:
            self._told.computed(worker.name, demand.chain)

    def finished(self, job: Job, now: float) -> None:
        demand, decision, _ = self._open.pop(id(job.request))
        decision.answering.load.add(-1.0, 0.0, -float(demand.prompt_tokens + demand.output_tokens))
        self._output += _WEIGHT * (job.request.output_tokens - self._output)

    def cache_changed(self, worker: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        if self._told is not None:
            changed = [_chunk(block) for block in stored], [_chunk(block) for block in removed]
            self._told.event(self._workers[worker].name, *changed)


def _chunk(block: int) -> int:
    return (block + 1) * _MIX & _MASK


def _name(number: int) -> str:
    return f"aggregated-{number}"


def _worker(number: int, setup: Setup) -> Worker:
    worker = Worker(WorkerSpec(name=_name(number), role="aggregated", url="http://127.0.0.1:1"))
    worker.facts = EngineFacts(kv_tokens=float(setup.engine.blocks * BLOCK_TOKENS), block_size=BLOCK_TOKENS)
    return worker


OURS: dict[str, Callable[[Setup], Router]] = {
    **{name: partial(Ours, policy=name, told=True) for name in POLICIES},
    "kv, no events": partial(Ours, policy="kv", told=False),
}
"""`kv, no events`: with the router's own prediction in place of the engines' events."""
