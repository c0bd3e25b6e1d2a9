"""How much a batch keeps in flight."""

from __future__ import annotations

import pytest

from hpcserve.batch.admission import Budget, EngineLoad, parse

IDLE = [EngineLoad("prefill", 0, 0), EngineLoad("decode", 4, 0)]
BUSY = [EngineLoad("prefill", 4, 20), EngineLoad("decode", 4, 20)]


def filled(budget: Budget, cost: float, most: int = 1000) -> int:
    """Let in as many rows as fit; how many run now."""
    while budget.rows < most and budget.fits(cost, workers=2):
        budget.enter(cost)
    return budget.rows


def steered(cost: float = 100.0) -> Budget:
    """Its first rows run, and something is known of the engines."""
    budget = Budget()
    filled(budget, cost)
    budget.steer(BUSY, queued=0.0)
    return budget


def test_it_grows_while_rows_are_held_back_and_nobody_waits() -> None:
    budget = Budget()
    assert filled(budget, 100.0) == 32
    budget.steer(IDLE, queued=0.0)
    assert filled(budget, 100.0) == 48


def test_it_does_not_grow_where_there_are_no_more_rows() -> None:
    budget = Budget()
    filled(budget, 100.0)
    budget.steer(IDLE, queued=0.0)
    limit = budget.limit
    filled(budget, 100.0, most=40)
    budget.steer(IDLE, queued=0.0)
    budget.steer(IDLE, queued=0.0)
    assert budget.limit == limit


def test_it_shrinks_while_a_queue_forms() -> None:
    budget = Budget()
    filled(budget, 100.0)
    before = budget.held
    budget.steer(BUSY, queued=0.0)
    assert budget.limit == pytest.approx(0.9 * before)


def test_it_shrinks_no_further_until_that_has_worked() -> None:
    budget = Budget()
    filled(budget, 100.0)
    before = budget.held
    for _ in range(60):
        budget.steer(BUSY, queued=0.0)
    assert budget.limit == pytest.approx(0.9 * before)
    while budget.held > budget.limit:
        budget.leave(100.0)
    budget.steer(BUSY, queued=0.0)
    assert budget.limit < 0.85 * before


def test_of_many_refusals_in_one_moment_one_counts() -> None:
    budget = steered()
    before = budget.limit
    for _ in range(50):
        budget.cut()
    assert before is not None and budget.limit == pytest.approx(0.9 * before)
    budget.steer([], queued=0.0)
    budget.cut()
    assert budget.limit == pytest.approx(0.81 * before)


@pytest.mark.parametrize("cost", [69.0, 400.0, 3000.0])
def test_a_budget_of_few_rows_grows_back(cost: float) -> None:
    """It is a row that has to fit, and not nine tenths of the budget that have to be in use."""
    budget = steered()
    while budget.rows:
        budget.leave(100.0)
    budget.held, budget.limit = 0.0, 140.0
    for _ in range(120):
        filled(budget, cost)
        budget.steer(IDLE, queued=0.0)
    assert budget.rows > 4


def test_engines_are_read_from_the_routers_metrics() -> None:
    text = """\
hpcserve_router_queued 3
hpcserve_router_engine_running{worker="decode-0",role="decode"} 4
hpcserve_router_engine_waiting{worker="decode-0",role="decode"} 1
"""
    assert parse(text) == ([EngineLoad("decode", 4, 1)], 3)
