"""TensorRT-LLM's /metrics: a JSON list with what its iterations did since the last reading.

Field names are those of the documentation of 1.2.1 (commands/trtllm-serve) and of the executor's
InflightBatchingStats. An engine without requests iterates no more, and answers an empty list. Counters are
added up here, from reading to reading; what another reader takes away in between is missing in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from .facts import EngineFacts


class _Cache(msgspec.Struct, rename="camel", gc=False):
    max_num_blocks: int = 0
    used_num_blocks: int = 0
    tokens_per_block: int = 0


class _Batch(msgspec.Struct, rename="camel", gc=False):
    num_context_requests: int = 0
    num_gen_requests: int = 0
    num_ctx_tokens: int = 0


class _Iteration(msgspec.Struct, rename="camel", gc=False):
    iter_latency: float = msgspec.field(default=0.0, name="iterLatencyMS")
    num_active_requests: int = 0
    num_queued_requests: int = 0
    kv_cache_stats: _Cache | None = None
    inflight_batching_stats: _Batch | None = None


_decode = msgspec.json.Decoder(list[_Iteration]).decode


def is_list(text: bytes) -> bool:
    """Are these metrics in TensorRT-LLM's form, and not in Prometheus's?"""
    return text[:16].lstrip().startswith(b"[")


def idle(facts: EngineFacts) -> EngineFacts:
    """The same engine without requests."""
    return replace(facts, running=0.0, waiting=0.0)


def read(text: bytes, before: EngineFacts | None) -> EngineFacts:
    """The facts after a reading; `before` are those after the last one. Raises ValueError for other JSON."""
    try:
        iterations = _decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"not the iterations of TensorRT-LLM: {error}") from error
    facts = before or EngineFacts()
    if not iterations:
        return idle(facts)
    last = iterations[-1]
    facts = _counted(facts, iterations)
    facts = replace(facts, running=float(last.num_active_requests), waiting=float(last.num_queued_requests))
    cache = last.kv_cache_stats
    if cache is None or not cache.max_num_blocks:
        return facts
    return replace(
        facts,
        kv_usage=cache.used_num_blocks / cache.max_num_blocks,
        kv_tokens=float(cache.max_num_blocks * cache.tokens_per_block) or None,
        block_size=cache.tokens_per_block or None,
    )


def _counted(facts: EngineFacts, iterations: Iterable[_Iteration]) -> EngineFacts:
    """An iteration with prompts takes as long as these; one without is a gap between each answer's tokens."""
    computed, prefill = facts.computed_tokens, facts.prefill_seconds
    gaps, seconds = facts.token_gaps, facts.token_gap_seconds
    for iteration in iterations:
        batch, took = iteration.inflight_batching_stats, iteration.iter_latency / 1000
        if batch is None:
            continue
        if batch.num_context_requests:
            computed += batch.num_ctx_tokens
            prefill += took
        else:
            gaps += batch.num_gen_requests
            seconds += batch.num_gen_requests * took
    return replace(
        facts,
        computed_tokens=computed,
        prefill_seconds=prefill,
        token_gaps=gaps,
        token_gap_seconds=seconds,
    )
