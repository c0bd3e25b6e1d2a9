"""Thousands of random states: each decision and each explanation is the one that cost.py's formula gives."""

from __future__ import annotations

import random

import pytest

from hpcserve.router.demand import Demand
from hpcserve.router.kv.match import Match
from hpcserve.router.placement.decision import Decision
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.placement.placer import Placer
from hpcserve.router.workers import Worker

from .pools import Index, workers
from .reference import Reference, Shown

STEPS = 60


@pytest.mark.parametrize("pairs", [False, True], ids=["aggregated", "pairs"])
@pytest.mark.parametrize("seed", range(40))
def test_decisions_are_those_of_the_formula(seed: int, pairs: bool) -> None:
    rng = random.Random(f"{seed} {pairs}")
    count = rng.choice((1, 2, 2, 3, 5, 8, rng.randint(1, 40)))
    if pairs:
        prefill = workers(rng.choice((1, 1, 2, 4, rng.randint(1, 40))), "prefill")
        answering = workers(count, "decode")
    else:
        prefill, answering = [], workers(count)
    everybody = [*answering, *prefill]
    domains = rng.choice(((None,), ("a",), ("a", "b"), ("a", "b", None)))
    for worker in everybody:
        worker.domain = rng.choice(domains)
    index, reference = Index(), Reference()
    placer = Placer("kv", index)
    now, waiting = 1.0, list[tuple[Worker, int, float]]()
    earlier: list[tuple[Decision, Shown]] = []
    for _ in range(STEPS):
        now += rng.choice((0.0, 0.001, 0.1, 5.0))
        for worker in rng.sample(everybody, rng.randint(0, len(everybody))):
            _change(rng, worker)
        while waiting and rng.random() < 0.6:
            worker, tokens, sent = waiting.pop(rng.randrange(len(waiting)))
            placer.prefill_ended(worker, tokens, now, seconds=rng.choice((None, now - sent)))
            worker.load.add(-1.0, -tokens, -tokens)
        demand = _demand(rng)
        index.held = {} if rng.random() < 0.2 else _held(rng, everybody, len(demand.chain))
        left = rng.sample(answering, rng.randint(1, count)) if rng.random() < 0.2 else answering
        tried = [worker for worker in answering if worker not in left]
        left = [worker for worker in answering if worker in left]
        decision = placer.place(demand, answering=answering, prefill=prefill, tried=tried, now=now)
        assert decision is not None
        held = index.held if demand.chain else {}
        name, first, uncached, shown = reference.place(demand, left, prefill, held, now)
        assert decision.answering.name == name
        assert (decision.prefill and decision.prefill.name) == first
        assert decision.uncached_tokens == uncached
        earlier.append((decision, shown))
        if rng.random() < 0.8:
            placer.placed(decision, demand, now)
            reference.placed(demand, name, uncached)
            worker = decision.prefill or decision.answering
            placer.prefill_began(worker, uncached, now)
            worker.load.add(1.0, uncached, uncached)
            waiting.append((worker, uncached, now))
    # Now, when all has changed: an explanation is of the moment of its decision.
    for decision, shown in earlier:
        _same(decision, shown)


def _same(decision: Decision, shown: Shown) -> None:
    assert len(decision.candidates) == len(shown)
    for candidate, (name, seconds, terms, cached) in zip(decision.candidates, shown, strict=True):
        assert (candidate.worker, candidate.cached_tokens) == (name, cached)
        assert candidate.cost == pytest.approx(seconds, abs=1e-9, rel=1e-9)
        assert list(candidate.terms) == list(terms)
        assert candidate.terms == pytest.approx(terms, abs=1e-9, rel=1e-9)


def _change(rng: random.Random, worker: Worker) -> None:
    load = worker.load
    load.add(
        rng.randint(0, 30) - load.in_flight,
        max(0.0, rng.uniform(-40_000, 60_000)) - load.prefill_tokens if not worker.queue.sent else 0.0,
        rng.uniform(-10_000, 1_100_000) - load.kv_tokens,
    )
    if rng.random() < 0.3:
        kv_tokens = rng.choice((None, 0.0, 500_000.0, 1e6))
        worker.facts = rng.choice((None, EngineFacts(kv_usage=rng.random() * 1.05, kv_tokens=kv_tokens)))
    if rng.random() < 0.3:
        rate = rng.choice(("prefill", "decode", "transfer", "kv_bytes_per_token"))
        worker.rates.observe(rate, getattr(worker.rates, rate) * rng.uniform(0.5, 2.0), 1.0)


def _demand(rng: random.Random) -> Demand:
    tokens = rng.choice((0, 1, 100, rng.randint(1, 4_000), rng.randint(1, 100_000)))
    chunks = rng.choice((0, 1, min(tokens, 16), min(tokens, 90)))
    beginning = rng.randrange(4) * 1000
    return Demand(
        prompt_tokens=tokens,
        output_tokens=rng.choice((0, 1, 256, 4096)),
        chain=tuple(range(beginning, beginning + chunks)),
        chunk_tokens=tokens / chunks if chunks else 0.0,
        session=rng.choice((None, "s1", "s2", "s3")),
    )


def _held(rng: random.Random, everybody: list[Worker], chunks: int) -> dict[str, Match]:
    found = {"somebody-else": Match(chunks)}
    for worker in everybody:
        if rng.random() < 0.6:
            gpu, cpu, storage = sorted(rng.randint(0, chunks) for _ in range(3))
            tiers = (gpu, cpu - gpu, storage - cpu) if rng.random() < 0.3 else (gpu, 0, 0)
            found[worker.name] = Match(*tiers)
    return found
