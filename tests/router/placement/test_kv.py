"""The policy `kv`: who wins, and how it says so."""

from __future__ import annotations

import pytest

from hpcserve.router.kv.match import Match
from hpcserve.router.placement import cost
from hpcserve.router.placement.placer import Placer

from .pools import Index, demand, workers


def place(index, asked, answering, prefill=(), tried=(), now=1.0):
    return Placer("kv", index).place(asked, answering=answering, prefill=prefill, tried=tried, now=now)


def test_the_worker_that_holds_the_prompt_wins():
    decision = place(Index(aggregated_2=90), demand(), workers(4))
    assert decision.answering.name == "aggregated-2"
    assert (decision.cached_tokens, decision.uncached_tokens) == (9_000, 1_000)


def test_a_long_queue_beats_a_short_match():
    pool = workers(2)
    pool[0].load.add(10.0, 80_000.0, 0.0)
    assert place(Index(aggregated_0=20), demand(), pool).answering is pool[1]


def test_the_longest_match_does_not_draw_everything():
    """Every prompt shares its first chunk: what is waiting for it must count for more."""
    pool, index = workers(4), Index(aggregated_0=1)
    placer = Placer("kv", index)
    counts = dict.fromkeys([worker.name for worker in pool], 0)
    for step in range(40):
        asked = demand(key=1000 * step)
        decision = placer.place(asked, answering=pool, now=1.0)
        placer.placed(decision, asked, 1.0)
        placer.prefill_began(decision.answering, decision.uncached_tokens, 1.0)
        decision.answering.load.add(1.0, decision.uncached_tokens, 0.0)
        counts[decision.answering.name] += 1
    assert max(counts.values()) <= 12


def test_full_kv_memory_turns_requests_away():
    pool = workers(2)
    pool[0].load.add(0.0, 0.0, 995_000.0)
    assert place(Index(aggregated_0=50), demand(2_000), pool).answering is pool[1]


def test_a_long_prefill_keeps_away_from_streams():
    pool = workers(2)
    pool[0].load.add(30.0, 0.0, 0.0)
    assert place(Index(), demand(50_000), pool).answering is pool[1]


def test_terms_add_up_to_the_cost_and_the_best_comes_first():
    pool = workers(8)
    for number, worker in enumerate(pool):
        worker.load.add(number, 1000.0 * number, 5_000.0 * number)
    decision = place(Index(aggregated_3=40, aggregated_5=99), demand(session="s"), pool)
    costs = [candidate.cost for candidate in decision.candidates]
    assert costs == sorted(costs)
    assert decision.candidates[0].worker == decision.answering.name
    for candidate in decision.candidates:
        assert sum(candidate.terms.values()) == pytest.approx(candidate.cost)
        assert {"wait", "prefill", "disturbance", "barrier", "stall"} <= set(candidate.terms)


def test_the_cost_that_decides_is_the_one_that_is_explained():
    pool = workers(3)
    pool[1].load.add(4.0, 3_000.0, 9_000.0)
    placer = Placer("kv", Index(aggregated_1=Match(30, cpu=20, storage=10)))
    decision = placer.place(demand(), answering=pool, now=1.0)
    by_name = {candidate.worker: candidate for candidate in decision.candidates}
    assert by_name["aggregated-1"].terms["loading"] > 0.0
    assert decision.candidates[0].cost == min(candidate.cost for candidate in decision.candidates)


def test_blocks_on_disk_count_for_less_than_on_the_gpu():
    index = Index(aggregated_0=Match(0, storage=90), aggregated_1=Match(90))
    assert place(index, demand(), workers(2)).answering.name == "aggregated-1"


def test_a_session_returns_to_its_worker_until_that_is_busy():
    pool, index = workers(4), Index()
    placer = Placer("kv", index)
    asked = demand(session="chat")
    first = placer.place(asked, answering=pool, now=1.0)
    placer.placed(first, asked, 1.0)
    again = placer.place(asked, answering=pool, now=2.0)
    assert again.answering is first.answering
    assert again.reason == "session"
    first.answering.load.add(20.0, 200_000.0, 0.0)
    assert placer.place(asked, answering=pool, now=3.0).answering is not first.answering


def test_siblings_that_come_together_spread_when_one_worker_cannot_keep_up():
    """A popular beginning is worth a second copy; a session's own is not."""
    pool = workers(4)
    asked = demand(20_000)
    popular, unique = Placer("kv", Index(aggregated_0=80)), Placer("kv", Index(aggregated_0=80))
    pool[0].load.add(3.0, 24_000.0, 0.0)
    for placer in (popular, unique):
        placer._view.pool(pool).prefilling = 0.6
        placer._view.pool(pool).behind = cost.behind(0.6)
    for _ in range(30):
        popular._view.popularity.used(asked.chain[79], 1.0)
    assert unique.place(asked, answering=pool, now=1.0).answering is pool[0]
    assert popular.place(asked, answering=pool, now=1.0).answering is not pool[0]


def test_nobody_left_is_none_and_the_last_one_is_taken():
    pool = workers(2)
    assert place(Index(), demand(), pool, tried=set(pool)) is None
    assert place(Index(), demand(), pool, tried={pool[0]}).answering is pool[1]


def test_with_many_workers_an_old_reading_does_not_decide():
    pool = workers(200)
    for worker in pool[1:]:
        worker.load.add(1.0, 4_000.0, 0.0)
    placer = Placer("kv", Index())
    assert placer.place(demand(), answering=pool, now=1.0).answering is pool[0]
    pool[0].load.add(5.0, 50_000.0, 0.0)
    assert placer.place(demand(), answering=pool, now=1.0).answering is not pool[0]


def test_prefill_goes_to_a_prefill_worker_when_streams_would_stop():
    decode, prefill = workers(2, "decode"), workers(2, "prefill")
    for worker in decode:
        worker.load.add(40.0, 0.0, 0.0)
    decision = place(Index(), demand(20_000), decode, prefill)
    assert decision.prefill is not None
    assert {"transfer", "two_legs"} <= set(decision.candidates[0].terms)
    assert "+" in decision.candidates[0].worker


def test_a_few_uncached_tokens_are_computed_where_the_answer_is_written():
    decode, prefill = workers(2, "decode"), workers(2, "prefill")
    for worker in prefill:
        worker.load.add(2.0, 16_000.0, 0.0)
    decision = place(Index(decode_1=99), demand(10_000), decode, prefill)
    assert decision.prefill is None
    assert decision.answering.name == "decode-1"
    assert decision.uncached_tokens == 100


def test_a_pair_stays_in_one_domain_unless_that_is_busy():
    decode, prefill = workers(4, "decode"), workers(4, "prefill")
    for number in range(4):
        decode[number].domain = prefill[number].domain = f"leaf-{number // 2}"
        decode[number].load.add(40.0, 0.0, 0.0)
    for worker in prefill[:2]:
        worker.load.add(1.0, 2_000.0, 0.0)
    for worker in decode[2:]:
        worker.load.add(1.0, 0.0, 0.0)
    decision = place(Index(), demand(60_000), decode, prefill)
    assert decision.answering.domain == decision.prefill.domain
    for worker in prefill:
        if worker.domain == decision.prefill.domain:
            worker.load.add(20.0, 500_000.0, 0.0)
    assert place(Index(), demand(60_000), decode, prefill).prefill.domain != decision.prefill.domain


def test_a_pair_is_remembered_on_both_workers():
    decode, prefill, index = workers(1, "decode"), workers(1, "prefill"), Index()
    decode[0].load.add(50.0, 0.0, 0.0)
    placer = Placer("kv", index)
    decision = placer.place(demand(), answering=decode, prefill=prefill, now=1.0)
    placer.placed(decision, demand(), 1.0)
    assert index.predicted == ["prefill-0", "decode-0"]
