"""vLLM 0.32's OffloadingConnector: KV blocks that the GPU has no room for, in memory and in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

from ..plan.offload import cpu_bytes, disk_bytes, shared_bytes
from . import arguments, variables
from .base import EngineContext
from .kv_files import ROOM

TOKENS_PER_FILE = 256
"""In the shared directory. With one block of 16 tokens each, a terabyte would be half a million files."""
_DISK = "kv-blocks"
_FILES = "hpcserve.engines.vllm_file_tiers"
_NOT_IN_KV = frozenset(
    {
        "async-scheduling",
        "chat-template",
        "compilation-config",
        "disable-access-log-for-endpoints",
        "enable-auto-tool-choice",
        "enable-chunked-prefill",
        "enable-log-requests",
        "enable-prompt-tokens-details",
        "enforce-eager",
        "generation-config",
        "gpu-memory-utilization",
        "max-num-batched-tokens",
        "max-num-seqs",
        "num-gpu-blocks-override",
        "reasoning-parser",
        "tool-call-parser",
        "tool-parser-plugin",
    }
)
"""Flags that change neither what a token's keys and values are nor how they lie in a block."""


def disk_tier(context: EngineContext) -> tuple[str, int] | None:
    """The directory on the node, and the bytes it may take."""
    size = disk_bytes(context.plan, context.replica)
    return (f"{context.scratch}/{_DISK}", size) if size else None


def tiers(context: EngineContext, own_variables: Collection[str]) -> dict[str, Any] | None:
    """KVTransferConfig of the connector; None without `kv_offload`.

    Its events must have their tokens, or nobody knows what they are about.
    """
    plan, replica = context.plan, context.replica
    if plan.model.kv_offload is None:
        return None
    extra: dict[str, Any] = {
        "cpu_bytes_to_use": cpu_bytes(plan, replica),
        "self_describing_kv_events": True,
    }
    files: list[dict[str, Any]] = []
    disk = disk_tier(context)
    if disk is not None:
        # No events of the disk: vLLM does not know which files hpcserve removes (node/agent/kv_disk.py).
        files.append(
            {"type": "DiskFiles", "module_path": _FILES, "root_dir": disk[0], "enable_kv_events": False}
        )
    if shared_bytes(plan):
        files.append(_shared_files(context, own_variables))
        extra["tokens_per_file"] = TOKENS_PER_FILE
    if files:
        extra["spec_name"] = "FileTiersSpec"
        extra["secondary_tiers"] = files
    if plan.device == "cpu":
        extra["spec_name"] = "HostFileTiersSpec" if files else "HostOffloadingSpec"
    if "spec_name" in extra:
        extra["spec_module_path"] = "hpcserve.engines.vllm_offload"
    if plan.model.kv_offload.answers:
        extra["offload_prompt_only"] = False
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def _shared_files(context: EngineContext, own_variables: Collection[str]) -> dict[str, Any]:
    return {
        "type": "SharedFiles",
        "module_path": _FILES,
        "directory": context.plan.site.storage.kv,
        "room": f"{context.run_dir}/{ROOM}",
        "settings": _settings(context, own_variables),
        "revision": context.plan.model.revision,
    }


def _settings(context: EngineContext, own_variables: Collection[str]) -> str:
    """Digest of all in model.yaml that may change a token's keys and values, or how they lie in a block."""
    model = context.plan.model
    args = arguments.merge(context.replica.role, model.engine_args, variables.pool(context).engine_args)
    said = {
        "flags": {name: value for name, (_, value) in args.items() if name not in _NOT_IN_KV},
        # With some kinds of RoPE scaling, frequencies follow the longest context.
        "model": [model.revision, model.dtype, model.quantization, model.max_model_len],
        "env": variables.given(context, own_variables),
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
