"""What is read from TensorRT-LLM's list of iterations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcserve.router.placement import iteration_stats
from hpcserve.router.placement.facts import EngineFacts, Rates


def iteration(*, active: int = 0, queued: int = 0, used: int = 0, took_ms: float = 10.0, **batch: int) -> Any:
    """As TensorRT-LLM 1.2.1 writes it, with a field that nobody reads."""
    return {
        "gpuMemUsage": 76665782272,
        "iterLatencyMS": took_ms,
        "numActiveRequests": active,
        "numQueuedRequests": queued,
        "kvCacheStats": {
            "maxNumBlocks": 1000, "usedNumBlocks": used, "freeNumBlocks": 1000 - used, "tokensPerBlock": 32,
        },
        "inflightBatchingStats": batch,
    }  # fmt: skip


def read(*iterations: Any, before: EngineFacts | None = None) -> EngineFacts:
    return iteration_stats.read(json.dumps(iterations).encode(), before)


def test_the_last_iteration_tells_how_full_the_engine_is():
    facts = read(iteration(active=9, used=900), iteration(active=3, queued=2, used=250))
    assert (facts.running, facts.waiting, facts.kv_usage) == (3.0, 2.0, 0.25)
    assert (facts.kv_tokens, facts.block_size) == (32_000.0, 32)


def test_counters_go_on_from_reading_to_reading():
    first = read(iteration(numContextRequests=1, numCtxTokens=800, took_ms=100))
    second = read(
        iteration(numContextRequests=1, numGenRequests=2, numCtxTokens=200, took_ms=25),
        iteration(numGenRequests=4, took_ms=20),
        before=first,
    )
    assert (second.computed_tokens, second.prefill_seconds) == pytest.approx((1000.0, 0.125))
    assert (second.token_gaps, second.token_gap_seconds) == pytest.approx((4.0, 0.08))
    rates = Rates()
    rates.learn(first, second)
    assert (rates.prefill, rates.decode) == pytest.approx((200 / 0.025, 50.0))


def test_an_idle_engine_answers_an_empty_list_and_keeps_its_size():
    busy = read(iteration(active=3, queued=1, used=250, numGenRequests=3))
    idle = read(before=busy)
    assert (idle.running, idle.waiting) == (0.0, 0.0)
    assert (idle.kv_tokens, idle.token_gaps) == (32_000.0, 3.0)
    assert read().kv_tokens is None


def test_the_two_forms_of_metrics_are_told_apart():
    assert iteration_stats.is_list(b"[]") and iteration_stats.is_list(b" [{}]")
    assert not iteration_stats.is_list(b"# HELP vllm:num_requests_running\n")


def test_other_json_is_an_error():
    with pytest.raises(ValueError, match="not the iterations"):
        iteration_stats.read(b'["x"]', None)
