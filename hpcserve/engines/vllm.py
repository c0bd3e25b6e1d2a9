"""vLLM 0.32: command line, environment, log lines, and the NIXL request protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..plan.plan import ReplicaPlan
from . import arguments, progress, variables, vllm_tiers
from .base import EngineCommand, EngineContext
from .kv_events import endpoints
from .nixl_protocol import NixlEngine

_INSIDE = "engines are reached through the router only; `router.port` is the endpoint's port"
_SIZES = "use `tensor_parallel`, `pipeline_parallel`, `data_parallel` and `nodes` of the pool"
_KV = "hpcserve connects prefill and decode by NIXL; `kv_lease` is what can be set"
RESERVED: Mapping[str, str] = {
    "model": "use the top-level key `model`",
    "model-tag": "use the top-level key `model`",
    "served-model-name": "use the top-level key `served_name`",
    "revision": "use the top-level key `revision`",
    "dtype": "use the top-level key `dtype`",
    "quantization": "use the top-level key `quantization`",
    "max-model-len": "use the top-level key `max_model_len`",
    "host": _INSIDE,
    "port": _INSIDE,
    "uds": _INSIDE,
    "grpc": _INSIDE,
    "root-path": _INSIDE,
    "ssl-keyfile": _INSIDE,
    "ssl-certfile": _INSIDE,
    "middleware": "hpcserve guards the engine with one; it has no room for others",
    "api-key": "the engines' key is made by hpcserve; `router.auth` is about the clients' key",
    "config": "write the file's settings into `engine_args`",
    "headless": _SIZES,
    "api-server-count": _SIZES,
    "nnodes": _SIZES,
    "node-rank": _SIZES,
    "master-addr": _SIZES,
    "master-port": _SIZES,
    "tensor-parallel-size": _SIZES,
    "tp": _SIZES,
    "pipeline-parallel-size": _SIZES,
    "pp": _SIZES,
    "data-parallel-size": _SIZES,
    "data-parallel-size-local": _SIZES,
    "data-parallel-rank": _SIZES,
    "data-parallel-start-rank": _SIZES,
    "data-parallel-address": _SIZES,
    "data-parallel-rpc-port": _SIZES,
    "data-parallel-external-lb": _SIZES,
    "data-parallel-hybrid-lb": _SIZES,
    "data-parallel-multi-port-external-lb": _SIZES,
    "dp": _SIZES,
    "enable-expert-parallel": "use `expert_parallel` of the pool",
    "kv-transfer-config": _KV,
    "kv-offloading-size": "use the top-level key `kv_offload`",
    "kv-offloading-backend": "use the top-level key `kv_offload`",
    "shutdown-timeout": "it follows from `slurm.kill_wait` of the site; see also the top-level key `drain`",
    "disable-log-stats": "READY is proven with the engine's metrics, so they stay on",
}
OWN_VARIABLES = frozenset(
    {
        "VLLM_API_KEY",
        "VLLM_HOST_IP",
        "VLLM_PORT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_NIXL_SIDE_CHANNEL_PORT",
        "CUDA_VISIBLE_DEVICES",
    }
)
CPU_KV_GIB = 2
"""vLLM would take most of the node's memory for the KV cache of each engine on device cpu."""

_PROGRESS: tuple[progress.Says, ...] = (
    (re.compile(r"Loading .*?shards.*?:\s+\d+% Completed \| (\d+)/(\d+)"), r"weights \1/\2"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took ([\d.]+) seconds"), r"weights loaded in \1 s"),
    (re.compile(r"Starting torch\.compile|Dynamo bytecode transform time"), "compiling"),
    (re.compile(r"torch\.compile took ([\d.]+) s"), r"compiled in \1 s"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), r"KV cache of \1 tokens"),
    (re.compile(r"Capturing CUDA graphs?.*?\| (\d+)/(\d+)"), r"CUDA graphs \1/\2"),
    (re.compile(r"Graph capturing finished"), "CUDA graphs captured"),
    (re.compile(r"Initializing NIXL wrapper"), "starting NIXL"),
    (re.compile(r"init engine .* took ([\d.]+) s"), r"engine initialised in \1 s"),
    (re.compile(r"Application startup complete"), "answering"),
)  # fmt: skip


class VLLM(NixlEngine):
    name = "vllm"
    key_variable = "VLLM_API_KEY"
    # Memory of cudaMalloc can't be shared with another node: UCX would take another way.
    nvlink_flag = "--enable-cumem-allocator"
    shared_ports = frozenset({"master", "dp_rpc"})

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        """vLLM adds the global data-parallel rank to the port of the side channel."""
        ranks = replica.data_parallel
        ports = {"http": 1}
        if replica.role != "aggregated":
            ports["side_channel"] = ranks
        if len(replica.nodes) > 1:
            ports["master"] = 1
            if ranks > 1:
                ports["dp_rpc"] = 1
        return ports

    def command(self, context: EngineContext) -> EngineCommand:
        """Raises ConfigError when `engine_args` or `env` sets what hpcserve sets."""
        events = bool(self.kv_event_endpoints(context))
        argv = [context.python, "-m", *_program(context), *_argv(context, events=events)]
        return EngineCommand(argv=tuple(argv), env=_environment(context))

    def kv_event_endpoints(self, context: EngineContext) -> tuple[endpoints.EventEndpoint, ...]:
        """() as well where `engine_args` say themselves what becomes of the events."""
        args = arguments.merge(
            context.replica.role, context.plan.model.engine_args, variables.pool(context).engine_args
        )
        if any(name.split(".", 1)[0] == "kv-events-config" for name in args):
            return ()
        replica = context.replica
        ranks = endpoints.ranks_on(context.node, nodes=len(replica.nodes), ranks=replica.data_parallel)
        return endpoints.in_directory(context.scratch, ranks)

    def disk_tier(self, context: EngineContext) -> tuple[str, int] | None:
        return vllm_tiers.disk_tier(context)

    def shared_memory(self, context: EngineContext) -> tuple[str, ...]:
        """Regions of KV tiers, one for each rank (v1/kv_offload/cpu/shared_offload_region.py)."""
        return tuple(f"vllm_offload_{engine}.mmap" for engine in _kv_engines(context))

    def progress(self, line: str) -> str | None:
        return progress.told(line, _PROGRESS)


def _program(context: EngineContext) -> list[str]:
    """Modules, because the `vllm` program does not work in every build."""
    if not _has_api(context):
        return ["hpcserve.engines.vllm_headless", "--model", context.model_path, "--headless"]
    return ["vllm.entrypoints.openai.api_server", "--model", context.model_path]


def _has_api(context: EngineContext) -> bool:
    return context.node in VLLM().api_nodes(context.replica)


def _argv(context: EngineContext, *, events: bool) -> Iterator[str]:
    plan, ports = context.plan, context.ports
    args = arguments.merge(context.replica.role, plan.model.engine_args, variables.pool(context).engine_args)
    arguments.refuse(args, RESERVED, "vLLM")
    yield from ("--served-model-name", plan.served_name)
    if _has_api(context):
        yield from ("--host", context.address, "--port", ports["http"])
        yield from ("--middleware", "hpcserve.engines.vllm_guard.JobKeyGuard")
        if "disable-access-log-for-endpoints" not in args:
            yield from ("--disable-access-log-for-endpoints", "/health,/metrics")
        # The router learns from each answer's usage how well its prediction of prefix hits was.
        if "enable-prompt-tokens-details" not in args:
            yield "--enable-prompt-tokens-details"
    for key in ("revision", "dtype", "quantization", "max_model_len"):
        value = getattr(plan.model, key)
        if value is not None:
            yield from (f"--{key.replace('_', '-')}", str(value))
    yield from _parallel(context)
    transfer = _transfer(context)
    if transfer is not None:
        yield from ("--kv-transfer-config", arguments.compact(transfer))
    if context.kv_over_nvlink and not {"enable-cumem-allocator", "no-enable-cumem-allocator"} & set(args):
        yield VLLM.nvlink_flag
    if events:
        yield from ("--kv-events-config", arguments.compact(endpoints.config(context.scratch)))
    yield from ("--shutdown-timeout", str(max(1, plan.site.slurm.kill_wait // 2)))
    yield from arguments.flags(args)


def _parallel(context: EngineContext) -> Iterator[str]:
    replica = context.replica
    yield from ("--tensor-parallel-size", str(replica.tensor_parallel))
    if replica.pipeline_parallel > 1:
        yield from ("--pipeline-parallel-size", str(replica.pipeline_parallel))
    if replica.data_parallel > 1:
        yield from ("--data-parallel-size", str(replica.data_parallel))
    if replica.expert_parallel:
        yield "--enable-expert-parallel"
    if len(replica.nodes) > 1:
        yield from ("--nnodes", str(len(replica.nodes)), "--node-rank", str(context.node))
        yield from ("--master-addr", context.head_address, "--master-port", context.ports["master"])
        if replica.data_parallel > 1:
            yield from ("--data-parallel-address", context.head_address)
            yield from ("--data-parallel-rpc-port", context.ports["dp_rpc"])
            if replica.expert_parallel and _has_api(context):
                # Each node's API serves its own ranks; with one of them vLLM makes it external balancing.
                yield "--data-parallel-hybrid-lb"


def _transfer(context: EngineContext) -> dict[str, Any] | None:
    """KVTransferConfig, with the name that the engine has for others."""
    transfer, name = _connectors(context), _engine_id(context)
    return transfer if transfer is None or name is None else {**transfer, "engine_id": name}


def _engine_id(context: EngineContext) -> str | None:
    """None where each process may make one up, as it does else, and appends its data-parallel rank.

    Where a rank has several processes, they must say the same, or decode refuses the blocks of all but the
    first (nixl/base_worker.py, _nixl_handshake); those without the rank's scheduler append nothing
    (v1/engine/core.py, run_engine_core). KV tiers name shared memory after the engine, so hpcserve must know
    the name to remove it. With several connectors it is the outer one's that counts.
    """
    replica = context.replica
    span = len(replica.nodes) // replica.data_parallel
    if span < 2 and context.plan.model.kv_offload is None:
        return None
    # Each start has another one: what others know of the one before is not about it.
    rank, follows = divmod(context.node, span) if span else (0, 0)
    return f"{context.start}_dp{rank}" if follows and replica.data_parallel > 1 else context.start


def _connectors(context: EngineContext) -> dict[str, Any] | None:
    """The way between prefill and decode, and KV tiers, or both."""
    nixl = None if context.replica.role == "aggregated" else _nixl(context)
    tiers = vllm_tiers.tiers(context, OWN_VARIABLES)
    if nixl is None or tiers is None:
        return nixl or tiers
    # Blocks are loaded from the first that has them, and saved to all. What to do when that fails is asked of
    # the outer one (v1/core/sched/scheduler.py).
    return {
        "kv_connector": "MultiConnector",
        "kv_role": nixl["kv_role"],
        "kv_buffer_device": nixl["kv_buffer_device"],
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [nixl, tiers]},
    }


def _kv_engines(context: EngineContext) -> list[str]:
    """Names of the ranks that compute on this node (v1/engine/core.py; where a rank spans nodes, all its
    processes take its first one's name: distributed/kv_transfer/kv_transfer_state.py)."""
    replica = context.replica
    if context.plan.model.kv_offload is None:
        return []
    if replica.data_parallel == 1:
        return [context.start]
    nodes, ranks = len(replica.nodes), replica.data_parallel
    first = context.node * ranks // nodes
    return [f"{context.start}_dp{rank}" for rank in range(first, first + max(1, ranks // nodes))]


def _nixl(context: EngineContext) -> dict[str, Any]:
    """A decode engine that can't get the blocks computes the prompt itself."""
    prefill = context.replica.role == "prefill"
    config: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if prefill else "kv_consumer",
        "kv_buffer_device": context.plan.device,
        "kv_connector_extra_config": {"kv_lease_duration": context.plan.model.kv_lease},
    }
    if not prefill:
        config["kv_load_failure_policy"] = "recompute"
    if context.plan.device == "cpu":
        config["kv_connector_module_path"] = "hpcserve.engines.vllm_nixl"
    return config


def _environment(context: EngineContext) -> dict[str, str]:
    """Later ones win: what hpcserve derives, the node's fabric, the site, model.yaml, the pool."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": f"{context.scratch}/vllm"}
    if context.plan.device == "cpu":
        env |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_GIB)}
        if context.cpus:
            workers = (",".join(map(str, cores)) for cores in context.cpus)
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(workers)
    env |= variables.common(context)
    env |= variables.given(context, OWN_VARIABLES)
    env["VLLM_HOST_IP"] = context.address
    env |= variables.visible_gpus(context)
    if context.replica.role != "aggregated":
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = context.address
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = context.ports["side_channel"]
    return env
