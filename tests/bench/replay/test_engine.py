"""The simulated engine keeps its books."""

from __future__ import annotations

import math

import pytest

from hpcserve.bench.replay.engine import EngineModel, Job, SimulatedEngine
from hpcserve.bench.replay.trace import TraceRequest

MODEL = EngineModel(blocks=10, prefill_rate=5120.0, chunk=512, step_base=0.01, step_per_answer=0.0)


def request(blocks, output=1, arrival=0.0):
    return TraceRequest(
        arrival=arrival, prompt_tokens=512 * len(blocks), output_tokens=output, blocks=tuple(blocks)
    )


def drain(engine):
    changes = []
    while engine.wake != math.inf:
        changes.append(engine.advance())
    return changes


def test_a_prompt_takes_its_tokens_over_the_rate_and_an_answer_a_step_for_each_token():
    engine, job = SimulatedEngine(MODEL), Job(request([1, 2], output=11), 0)
    engine.submit(job, 0.0)
    drain(engine)
    assert job.first_token == pytest.approx(0.2)
    assert job.itl == pytest.approx(0.01)
    assert sum(engine.gaps.values()) == 10


def test_a_prompt_seen_before_is_a_hit_but_for_one_token():
    engine = SimulatedEngine(MODEL)
    first, second = Job(request([1, 2]), 0), Job(request([1, 2, 3]), 0)
    engine.submit(first, 0.0)
    drain(engine)
    engine.submit(second, 10.0)
    drain(engine)
    assert (first.blocks_hit, second.blocks_hit) == (0, 2)
    assert second.uncached == 512


def test_the_least_recently_used_block_and_of_a_prompt_its_last_is_evicted_first():
    engine = SimulatedEngine(MODEL)
    removed = []
    for blocks in ([1, 2, 3, 4], [11, 12, 13], [1, 2], [21, 22, 23]):
        engine.submit(Job(request(blocks), 0), 0.0)
        for change in drain(engine):
            removed += change.removed
    assert removed == [4]
    engine.submit(Job(request([31, 32]), 0), 0.0)
    removed = [block for change in drain(engine) for block in change.removed]
    assert removed == [3, 13, 12][: len(removed)]


def test_running_requests_keep_their_blocks_and_others_wait():
    engine = SimulatedEngine(MODEL)
    first, second = Job(request(range(8), output=50), 0), Job(request(range(20, 28)), 0)
    engine.submit(first, 0.0)
    engine.submit(second, 0.0)
    drain(engine)
    assert second.first_token > first.finished


def test_a_prefill_stalls_the_answers_beside_it():
    engine = SimulatedEngine(MODEL)
    answer, prompt = Job(request([1], output=21), 0), Job(request([2, 3, 4, 5], arrival=0.15), 0)
    engine.submit(answer, 0.0)
    while engine.wake < 0.15:
        engine.advance()
    engine.submit(prompt, 0.15)
    drain(engine)
    alone = 0.1 + 20 * 0.01
    assert answer.finished == pytest.approx(alone + 4 * 0.1, abs=0.001)
    assert prompt.first_token > 0.15 + 0.4
    assert max(engine.gaps) == pytest.approx(0.11)


def test_a_request_larger_than_the_cache_is_served_alone():
    engine, job = SimulatedEngine(MODEL), Job(request(range(15)), 0)
    engine.submit(job, 0.0)
    drain(engine)
    assert job.finished > 0.0
    assert engine.usage == 0.0
