"""How far prefills are."""

from __future__ import annotations

import msgspec
import pytest

from hpcserve.router.config import WorkerSpec
from hpcserve.router.placement import cost
from hpcserve.router.workers import WorkerTable

from .pools import workers


def test_the_rate_is_measured_from_when_a_prompts_turn_came():
    (worker,) = workers(1)
    worker.queue.began(4_000, 10.0)
    worker.queue.began(8_000, 10.0)
    worker.queue.ended(4_000, 11.0, 1.0)
    worker.queue.ended(8_000, 13.0, 3.0)
    assert worker.rates.prefill == pytest.approx(4_000, rel=0.02)
    assert not worker.queue.sent


def test_a_prompt_that_failed_leaves_the_queue_and_teaches_nothing():
    (worker,) = workers(1)
    worker.queue.began(4_000, 10.0)
    worker.queue.ended(4_000, 70.0, None)
    assert not worker.queue.sent
    assert not worker.rates.measured


def test_a_worker_that_was_started_again_has_an_empty_queue():
    spec = WorkerSpec(name="aggregated-0", role="aggregated", url="http://127.0.0.1:1")
    table = WorkerTable([spec])
    (before,) = table.all()
    before.queue.began(4_000, 10.0)
    table.update([msgspec.structs.replace(spec, generation=1)])
    (after,) = table.all()
    after.queue.began(2_000, 10.5)
    before.queue.ended(4_000, 11.0, None)
    assert after.queue.head == 2_000 and not before.queue.sent


def test_waiting_shrinks_as_the_first_prompt_is_computed_but_not_beyond_it():
    at_once = cost.wait(10_000, 4_000, 0.0, 1_000)
    later = cost.wait(10_000, 4_000, 2.0, 1_000)
    stuck = cost.wait(10_000, 4_000, 600.0, 1_000)
    assert at_once == 10.0
    assert at_once > later > stuck > 6.0


def test_costs_stay_finite_at_the_edges():
    assert cost.barrier(5.0) == cost.barrier(1.0) < 20.0
    assert cost.barrier(-1.0) == 0.0
    assert cost.behind(0.0) == 1.0
    assert cost.behind(2.0) == cost.behind(cost.BUSIEST)
