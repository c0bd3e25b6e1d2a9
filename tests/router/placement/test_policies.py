"""The policies other than `kv`."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from hpcserve.router.placement.placer import Placer
from hpcserve.router.placement.policies import POLICIES

from .pools import Index, demand, workers


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_leaves_out_workers_that_were_tried(policy):
    pool = workers(3)
    placer = Placer(policy, Index(aggregated_0=50))
    for step in range(20):
        decision = placer.place(demand(key=step), answering=pool, tried={pool[0]}, now=1.0)
        assert decision.answering in pool[1:]
        assert decision.policy == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_pairs(policy):
    decode, prefill = workers(2, "decode"), workers(2, "prefill")
    for worker in decode:
        worker.load.add(50.0, 0.0, 0.0)
    decision = Placer(policy).place(demand(), answering=decode, prefill=prefill, now=1.0)
    assert decision.answering in decode
    assert decision.prefill in prefill


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_pairs_only_where_decode_computes_no_prompts(policy):
    """However long prefill has to do: of two idle workers `kv` would take decode alone."""
    decode, prefill = workers(2, "decode"), workers(2, "prefill")
    for worker in prefill:
        worker.queue.began(10_000_000, 1.0)
    decision = Placer(policy, pairs_only=True).place(demand(), answering=decode, prefill=prefill, now=1.0)
    assert decision.prefill in prefill
    if policy == "kv":
        assert Placer(policy).place(demand(), answering=decode, prefill=prefill, now=1.0).prefill is None


def test_an_unknown_policy_is_refused():
    with pytest.raises(KeyError):
        Placer("fastest")


def test_a_worker_that_just_failed_is_avoided_while_others_can_serve():
    pool = workers(2)
    pool[0].breaker.failed(1.0)
    placer = Placer("round_robin")
    assert {placer.place(demand(), answering=pool, now=1.1).answering for _ in range(4)} == {pool[1]}
    assert placer.place(demand(), answering=pool, tried={pool[1]}, now=1.1).answering is pool[0]


def test_round_robin_takes_turns_in_both_roles():
    decode, prefill = workers(3, "decode"), workers(2, "prefill")
    placer = Placer("round_robin")
    made = [placer.place(demand(), answering=decode, prefill=prefill, now=1.0) for _ in range(6)]
    assert set(Counter(decision.answering.name for decision in made).values()) == {2}
    assert set(Counter(decision.prefill.name for decision in made).values()) == {3}


def test_least_load_counts_prefill_before_requests_and_equals_take_turns():
    pool = workers(3)
    pool[0].load.add(1.0, 50_000.0, 0.0)
    pool[1].load.add(9.0, 0.0, 0.0)
    pool[2].load.add(9.0, 0.0, 0.0)
    placer = Placer("least_load")
    made = {placer.place(demand(), answering=pool, now=1.0).answering for _ in range(4)}
    assert made == {pool[1], pool[2]}


def test_power_of_two_never_takes_the_busiest():
    pool = workers(4)
    pool[3].load.add(50.0, 500_000.0, 0.0)
    placer = Placer("power_of_two")
    made = {placer.place(demand(), answering=pool, now=1.0).answering for _ in range(50)}
    assert pool[3] not in made
    assert len(made) > 1


def test_consistent_hash_keeps_sessions_and_moves_few_when_a_worker_goes():
    pool = workers(5)
    placer = Placer("consistent_hash")

    def owners(answering):
        return {
            key: placer.place(demand(session=f"s{key}"), answering=answering, now=1.0).answering.name
            for key in range(400)
        }

    before = owners(pool)
    assert owners(pool) == before
    assert min(Counter(before.values()).values()) > 400 / 5 / 3
    after = owners(pool[1:])
    assert all(after[key] == before[key] for key in before if before[key] != "aggregated-0")
    assert owners(pool) == before


def test_consistent_hash_tells_prompts_apart_that_share_a_beginning():
    pool = workers(4)
    placer = Placer("consistent_hash")
    made = set()
    for step in range(50):
        asked = demand(51_200)
        made.add(placer.place(_with_second(asked, step), answering=pool, now=1.0).answering)
    assert len(made) == 4


def _with_second(asked, step):
    chain = (asked.chain[0], *[1000 * step + c for c in asked.chain[1:]])
    return msgspec.structs.replace(asked, chain=chain)


def test_prefix_follows_the_longest_match_but_not_into_a_crowd():
    pool = workers(3)
    placer = Placer("prefix", Index(aggregated_0=10, aggregated_1=90))
    assert placer.place(demand(), answering=pool, now=1.0).answering is pool[1]
    pool[1].load.add(10.0, 0.0, 0.0)
    assert placer.place(demand(), answering=pool, now=1.0).answering is pool[0]
