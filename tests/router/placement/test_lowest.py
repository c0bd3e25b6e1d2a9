"""The compiled `kv` decides as the Python one does, explains it alike, and leaves the same behind."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hpcserve.config.model import Role
from hpcserve.http.compiled import compiled
from hpcserve.router.demand import Demand
from hpcserve.router.kv.match import Match
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.placement.placer import Placer

from .pools import Index, demand, workers

assert compiled("router.placement.lowest", "a test") is not None, "`make venv` compiles it"

PAIR: tuple[Role, Role] = ("prefill", "decode")


def random_pool(dice: random.Random, count: int, role: Role = "aggregated") -> Any:
    pool = workers(count, role)
    for worker in pool:
        worker.domain = dice.choice((None, "rack-0", "rack-1"))
        if dice.random() < 0.5:
            worker.rates.observe("transfer", dice.randrange(1, 9) * 1e9, dice.uniform(0.1, 3.0))
        worker.load.add(dice.choice((0.0, 3.0, 40.0)), 0.0, dice.choice((0.0, 5e5, 2e6)))
        worker.facts = dice.choice(
            (
                None,
                EngineFacts(kv_usage=dice.random()),
                EngineFacts(kv_tokens=1e6),
                EngineFacts(kv_tokens=0.0),
            )
        )
        worker.rates.observe("prefill", dice.randrange(2_000, 90_000), dice.uniform(0.1, 3.0))
    return pool


def random_demand(dice: random.Random) -> Demand:
    return demand(
        dice.randrange(0, 30_000), key=1000 * dice.randrange(4), session=dice.choice((None, "a", "b")),
        chunks=dice.choice((1, 10, 100)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_both_decide_alike(seed: int) -> None:
    dice = random.Random(seed)
    count = dice.choice((1, 2, 2, 3, 5, 32, 40))
    slow = dice.random() < 0.2
    ways = []
    for _ in range(2):
        own = random.Random(seed)
        held = {
            f"aggregated_{number}": Match(own.randrange(1, 90), own.randrange(9) if slow else 0)
            for number in range(count)
            if own.random() < 0.5
        }
        ways.append((Placer("kv", Index(**held)), random_pool(own, count)))
    (ours, first), (theirs, second) = ways
    assert ours._policy._choose is not None  # type: ignore[attr-defined]
    theirs._policy._choose = None  # type: ignore[attr-defined]
    now = 1.0
    for step in range(30):
        asked = random_demand(dice)
        now += dice.choice((0.0, 0.01, 2.0))
        outcomes = []
        for placer, pool in ((ours, first), (theirs, second)):
            decision = placer.place(asked, answering=pool, now=now)
            assert decision is not None
            placer.placed(decision, asked, now)
            worker = decision.answering
            if step % 3:
                worker.queue.began(decision.uncached_tokens, now)
                worker.load.add(1.0, decision.uncached_tokens, asked.prompt_tokens)
            shared = placer._view._pools[-1]
            outcomes.append(
                (worker.name, decision.reason, decision.uncached_tokens, decision.cached_tokens,
                 str(decision.candidates), shared.prefilling, shared.behind, shared.reads, shared.turn)
            )  # fmt: skip
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("seed", range(60))
def test_both_choose_the_same_pair(seed: int) -> None:
    dice = random.Random(seed)
    sizes = dice.choice((1, 1, 2, 3, 5, 33)), dice.choice((1, 2, 4, 7))
    slow, together = dice.random() < 0.2, dice.random() < 0.2
    ways = []
    for _ in range(2):
        own = random.Random(seed)
        pools = [random_pool(own, count, role) for count, role in zip(sizes, PAIR, strict=True)]
        held = {
            worker.name: Match(own.randrange(1, 90), own.randrange(9) if slow else 0)
            for pool in pools
            for worker in pool
            if own.random() < 0.5
        }
        ways.append((Placer("kv", Index(**held), pairs_only=together), *pools))
    ours, theirs = ways[0][0], ways[1][0]
    assert ours._policy._choose_pair is not None  # type: ignore[attr-defined]
    theirs._policy._choose_pair = theirs._policy._choose = None  # type: ignore[attr-defined]
    now = 1.0
    for step in range(30):
        asked = random_demand(dice)
        now += dice.choice((0.0, 0.01, 2.0))
        outcomes = []
        for placer, prefill, decode in ways:
            decision = placer.place(asked, answering=decode, prefill=prefill, now=now)
            assert decision is not None
            placer.placed(decision, asked, now)
            first = decision.prefill or decision.answering
            if step % 3:
                first.queue.began(decision.uncached_tokens, now)
                first.load.add(1.0, decision.uncached_tokens, asked.prompt_tokens)
                decision.answering.load.add(1.0, 0.0, asked.prompt_tokens)
            view = placer._view
            outcomes.append(
                (first.name, decision.answering.name, decision.reason, decision.uncached_tokens,
                 decision.cached_tokens, str(decision.candidates), vars(view.popularity),
                 [(pool.prefilling, pool.behind, pool.reads, pool.turn) for pool in view._pools])
            )  # fmt: skip
        assert str(outcomes[0]) == str(outcomes[1])
