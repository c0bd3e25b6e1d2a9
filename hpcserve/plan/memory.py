"""Memory of one GPU: its part of the weights, and what is left for the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.model_facts import ModelFacts

GIB = 1 << 30
COMFORTABLE = 0.6
"""Part of a GPU's memory that weights may take when hpcserve chooses; the rest is KV cache."""
TIGHT = 0.9
"""Part that weights and KV cache can take at all; vLLM 0.32's gpu-memory-utilization is 0.92 by default."""


def weights_per_gpu(facts: ModelFacts, *, ranks: int, data: int, spread: bool) -> float | None:
    """Bytes of the weights on one GPU; None where the model's size is not known.

    `ranks`: GPUs of one data-parallel rank, which share all weights. `spread`: the `data` ranks share the
    routed experts as well, and nothing else: each keeps its own attention and dense layers.
    """
    if not facts.weight_bytes:
        return None
    if not spread:
        return facts.weight_bytes / ranks
    experts = facts.expert_bytes if facts.expert_bytes is not None else facts.weight_bytes
    return (facts.weight_bytes - experts) / ranks + experts / (ranks * data)


def kv_bytes_per_gpu(facts: ModelFacts, *, tensor: int, pipeline: int) -> float | None:
    """Bytes of one token's KV cache on one GPU; None where it is not known.

    Heads are split over tensor-parallel ranks, and kept twice where there are more ranks than heads; a latent
    vector is kept by each rank.
    """
    if facts.kv_bytes is None:
        return None
    shared = 1 if facts.kv_latent else min(tensor, facts.num_key_value_heads or 1)
    return facts.kv_bytes / shared / pipeline


def gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"
