"""What NIXL can't do between a prefill and a decode replica, so that planning refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.model import Role
from ..errors import PlanError
from .abilities import ABILITIES
from .parallel import Shape

if TYPE_CHECKING:
    from ..config.model_facts import ModelFacts


def check_pair(engine: str, shapes: dict[Role, Shape], facts: ModelFacts | None) -> None:
    """Raises PlanError."""
    prefill, decode, able = shapes["prefill"], shapes["decode"], ABILITIES[engine]
    if not able.nixl:
        return
    if prefill.pipeline > 1 and not able.staged_prefill:
        # vLLM 0.32: each stage's cache has fewer layers than decode's (nixl/base_worker.py,
        # _validate_remote_agent_handshake).
        raise PlanError(
            f"prefill.pipeline_parallel is {prefill.pipeline}, but {able.title}'s NIXL connector "
            "can't read KV blocks of more than one pipeline stage",
            hint="use `prefill: {pipeline_parallel: 1}` and a larger tensor_parallel",
        )
    if decode.pipeline > 1 and not (able.staged_decode and decode.pipeline == prefill.pipeline):
        several = (
            "another number of pipeline stages than prefill"
            if able.staged_decode
            else "more than one pipeline stage"
        )
        raise PlanError(
            f"decode.pipeline_parallel is {decode.pipeline}, but {able.title}'s NIXL connector "
            f"can't receive KV blocks with {several}",
            hint="use `decode: {pipeline_parallel: 1}` and a larger tensor_parallel",
        )
    small, large = sorted((prefill.tensor, decode.tensor))
    if large % small:
        raise PlanError(
            f"prefill.tensor_parallel is {prefill.tensor} and decode.tensor_parallel {decode.tensor}, "
            "but for KV transfer one must divide the other",
            hint=f"set both to {large}, or one to a multiple of the other",
        )
    # Not of models with states or latent vectors.
    alike = facts is not None and facts.kv_values is not None and not facts.kv_latent
    heads = facts.num_key_value_heads if facts is not None and alike else None
    if heads and prefill.tensor > max(heads, decode.tensor) and not able.narrows_repeated_heads:
        # The same function: two of prefill's GPUs have the same head.
        raise PlanError(
            f"prefill.tensor_parallel is {prefill.tensor} and decode.tensor_parallel {decode.tensor}, but "
            f"the model has {heads} KV heads, and {able.title}'s NIXL connector can't read from more GPUs "
            "than that into fewer",
            hint=f"set `prefill.tensor_parallel` to {heads} or less, or both to {prefill.tensor}",
        )
