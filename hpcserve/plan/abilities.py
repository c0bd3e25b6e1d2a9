"""What each engine can do, as far as a plan depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """Of one engine program."""

    title: str
    """Its name in messages."""
    spans_nodes: bool = True
    """One replica can have several nodes."""
    by_step: bool = False
    """Such a replica is one MPI program in a Slurm step of its own."""
    weights: bool = True
    """It loads the model, so that needs its memory."""
    nixl: bool = True
    """KV blocks go by NIXL's UCX, and its rules hold for pairs of replicas."""
    kv_offload: bool = False
    """It can keep KV blocks in memory and on disk."""
    cpu_workers: bool = False
    """On `device: cpu`, one replica can have several workers, as it has several GPUs elsewhere."""
    cpu_experts: bool = False
    """On `device: cpu`, data-parallel ranks can share a model's experts."""
    expert_copies: bool = False
    """Data-parallel ranks on one node have all experts each, without expert parallelism."""
    staged_prefill: bool = True
    """Prefill can have several pipeline stages."""
    staged_decode: bool = False
    """Decode can have as many pipeline stages as prefill; else it has one."""
    narrows_repeated_heads: bool = True
    """Where prefill has more GPUs than the model has KV heads, decode can have fewer than prefill."""


ABILITIES: Mapping[str, Abilities] = {
    "vllm": Abilities(
        title="vLLM", kv_offload=True, cpu_workers=True, staged_prefill=False, narrows_repeated_heads=False
    ),
    "sglang": Abilities(title="SGLang", expert_copies=True, staged_decode=True),
    "tensorrt-llm": Abilities(title="TensorRT-LLM", by_step=True, staged_decode=True),
    "fake": Abilities(
        title="the fake engine", spans_nodes=False, weights=False, nixl=False, cpu_workers=True
    ),
}
"""By the name in model.yaml. Of vLLM 0.32, SGLang 0.5.23 and TensorRT-LLM 1.2.1."""
