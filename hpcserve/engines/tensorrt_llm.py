"""TensorRT-LLM 1.2.1: command line, worker file, environment, log lines. Its request protocol is in
`context_protocol.py`.

Flags are those of `trtllm-serve serve`, and keys of the worker file those of LlmArgs (llmapi/llm_args.py),
both in commit 376f7e1 (v1.2.1). On one node a replica is one process: TensorRT-LLM starts a worker for each
GPU itself, by MPI (llmapi/mpi_session.py, MpiPoolSession), as long as no other launcher's variables are in
its environment. Over several nodes it is a Slurm step with a task for each GPU. Each is a worker that
trtllm-llmapi-launch starts, and in the first task the command runs beside it, without MPI's variables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..errors import ConfigError
from ..plan.plan import ReplicaPlan
from . import arguments, progress, variables
from .base import EngineCommand, EngineContext
from .context_protocol import ContextEngine
from .tensorrt_llm_server import KEY_VARIABLE, NAME_FLAG

WORKER_FILE = "tensorrt-llm.yaml"

_INSIDE = "engines are reached through the router only; `router.port` is the endpoint's port"
_SIZES = "use `tensor_parallel`, `pipeline_parallel` and `data_parallel` of the pool"
_EXPERTS = "use `expert_parallel` of the pool"
_OWN_ROUTER = "hpcserve's router sends requests to prefill and decode; TensorRT-LLM's own is not used"
_MPI = "hpcserve leaves it to TensorRT-LLM to start its workers by MPI"
RESERVED: Mapping[str, str] = {
    "model": "use the top-level key `model`",
    "served-model-name": "use the top-level key `served_name`",
    "revision": "use the top-level key `revision`",
    "dtype": "use the top-level key `dtype`",
    "max-seq-len": "use the top-level key `max_model_len`",
    "host": _INSIDE,
    "port": _INSIDE,
    "backend": "hpcserve runs TensorRT-LLM's PyTorch backend",
    "config": "write the file's settings into `engine_args`",
    "extra-llm-api-options": "write the file's settings into `engine_args`",
    "tensor-parallel-size": _SIZES,
    "tp-size": _SIZES,
    "pipeline-parallel-size": _SIZES,
    "pp-size": _SIZES,
    "context-parallel-size": _SIZES,
    "cp-size": _SIZES,
    "gpus-per-node": _SIZES,
    "enable-attention-dp": _SIZES,
    "moe-expert-parallel-size": _EXPERTS,
    "ep-size": _EXPERTS,
    "server-role": _OWN_ROUTER,
    "disagg-cluster-uri": _OWN_ROUTER,
    "disagg-cluster": _OWN_ROUTER,
    "metadata-server-config-file": _OWN_ROUTER,
    "enable-iter-perf-stats": "the router reads from them how full the engine is, so they stay on",
    "env-overrides": "use `env`",
    "mpi-session": _MPI,
    "orchestrator-type": _MPI,
}
OWN_VARIABLES = frozenset(
    {
        KEY_VARIABLE,
        "CUDA_VISIBLE_DEVICES",
        "TLLM_DISABLE_MPI",
        "TLLM_SPAWN_PROXY_PROCESS",
        "TRTLLM_USE_MPI_KVCACHE",
        "TRTLLM_USE_NIXL_KVCACHE",
        "TRTLLM_USE_UCX_KVCACHE",
    }
)
# What the command knows and LlmArgs do not; all else goes into the worker file, which wins over flags.
COMMAND_ONLY = frozenset(
    {
        "chat-template",
        "custom-module-dirs",
        "free-gpu-memory-fraction",
        "kv-cache-free-gpu-memory-fraction",
        "log-level",
        "media-io-kwargs",
        "tool-parser",
    }
)
# In a container its user can be root, and what an image says to Open MPI about that is gone with the other
# variables of MPI.
_AS_ROOT = (
    "OMPI_ALLOW_RUN_AS_ROOT",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
    "PRTE_ALLOW_RUN_AS_ROOT",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM",
)
_TRANSFER = "cache-transceiver-config"
_OVERLAP = "disable-overlap-scheduler"

_PROGRESS: tuple[progress.Says, ...] = (
    (re.compile(r"Loading \w+ weights in parallel:\s+\d+%.*?\| (\d+)/(\d+)"), r"weights \1/\2"),
    (re.compile(r"Loading weights:\s+\d+%.*?\| (\d+)/(\d+)"), r"layers \1/\2"),
    (re.compile(r"Prefetching ([\d.]+GB) checkpoint files"), r"reading \1 of weights"),
    (re.compile(r"Model init total -- ([\d.]+)s"), r"model initialised in \1 s"),
    (re.compile(r"Application startup complete"), "answering"),
)

_Args = dict[str, tuple[str, Any]]


class TensorRTLLM(ContextEngine):
    name = "tensorrt-llm"
    key_variable = KEY_VARIABLE
    mpi_launcher = "trtllm-llmapi-launch"
    # /metrics asks the workers in a call that blocks the server, for up to two seconds while there is nothing
    # new, and then waits as long for more (serve/openai_server.py and executor/proxy.py, around 1.2).
    metrics_wait = 4.0

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        """Its workers choose the ports of their NIXL agents themselves, and tell them with each request."""
        return {"http": 1}

    def command(self, context: EngineContext) -> EngineCommand:
        """Raises ConfigError when `engine_args` or `env` sets what hpcserve sets, and for what TensorRT-LLM
        can't do."""
        args = _given(context)
        arguments.refuse(args, RESERVED, "TensorRT-LLM")
        _check(context)
        own = {flag: entry for flag, entry in args.items() if flag in COMMAND_ONLY}
        others = {flag: entry for flag, entry in args.items() if flag not in COMMAND_ONLY}
        argv = [context.python, "-m", "hpcserve.engines.tensorrt_llm_server", *_argv(context)]
        argv += ["--config", f"{context.scratch}/{WORKER_FILE}", *_flags(own)]
        text = yaml.safe_dump(_worker(context, others), sort_keys=False)
        return EngineCommand(argv=tuple(argv), env=_environment(context), files={WORKER_FILE: text})

    def progress(self, line: str) -> str | None:
        return progress.told(line, _PROGRESS)


def _given(context: EngineContext) -> _Args:
    """`engine_args` of model.yaml for this replica."""
    model, role = context.plan.model, context.replica.role
    return arguments.merge(role, model.engine_args, variables.pool(context).engine_args)


def _check(context: EngineContext) -> None:
    model, replica = context.plan.model, context.replica
    if context.plan.device == "cpu":
        raise ConfigError(
            "TensorRT-LLM needs GPUs, and `device` is cpu", hint="use `engine: vllm` in model.yaml"
        )
    if model.quantization is not None:
        raise ConfigError(
            f"quantization: TensorRT-LLM has no setting for '{model.quantization}'",
            hint="leave `quantization` out: it is read from the checkpoint's hf_quant_config.json",
        )
    if replica.data_parallel > 1 and replica.tensor_parallel > 1:
        raise ConfigError(
            f"{replica.role}: tensor_parallel is {replica.tensor_parallel} and data_parallel "
            f"{replica.data_parallel}, but TensorRT-LLM splits attention over all ranks or over none",
            hint="set one of the two to 1",
        )


def _ranks(replica: ReplicaPlan) -> int:
    """TensorRT-LLM's tensor_parallel_size: with attention apart, each of them has requests of its own."""
    return replica.tensor_parallel * replica.data_parallel


def _argv(context: EngineContext) -> Iterator[str]:
    model, replica = context.plan.model, context.replica
    yield from (NAME_FLAG, context.plan.served_name, context.model_path)
    yield from ("--host", context.address, "--port", context.ports["http"], "--backend", "pytorch")
    yield from ("--tp_size", str(_ranks(replica)))
    if replica.pipeline_parallel > 1:
        yield from ("--pp_size", str(replica.pipeline_parallel))
    if replica.expert_parallel:
        yield from ("--ep_size", str(_ranks(replica)))
    if len(replica.nodes) > 1:
        yield from ("--gpus_per_node", str(len(replica.gpus)))
    for key, flag in (("revision", "revision"), ("max_model_len", "max_seq_len")):
        value = getattr(model, key)
        if value is not None:
            yield from (f"--{flag}", str(value))


def _flags(args: _Args) -> Iterator[str]:
    """TensorRT-LLM spells flags with underscores, and repeats one that has several values."""
    for flag, (_, value) in args.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            yield f"--{_key(flag)}"
            yield json.dumps(each) if isinstance(each, Mapping) else str(each)


def _worker(context: EngineContext, args: _Args) -> dict[str, Any]:
    """LlmArgs: what hpcserve sets, and `engine_args`."""
    model, replica = context.plan.model, context.replica
    found: dict[str, Any] = {}
    if model.dtype is not None:
        found["dtype"] = model.dtype
    if replica.data_parallel > 1:
        found["enable_attention_dp"] = True
    if replica.role == "prefill":
        # A context server has none (1.2.1's features/disagg-serving).
        found[_key(_OVERLAP)] = True
        if _OVERLAP in args and args[_OVERLAP][1] is not True:
            raise ConfigError(
                f"{args[_OVERLAP][0]}: TensorRT-LLM's prefill replicas have no overlap scheduler",
                hint="set it for the pools `decode` and `aggregated` only",
            )
    found["enable_iter_perf_stats"] = True
    found |= {_key(flag): value for flag, (_, value) in args.items() if flag != _TRANSFER}
    if replica.role != "aggregated":
        found[_key(_TRANSFER)] = _transceiver(context, args)
    elif _TRANSFER in args:
        found[_key(_TRANSFER)] = args[_TRANSFER][1]
    return found


def _transceiver(context: EngineContext, args: _Args) -> dict[str, Any]:
    """Without a backend, TensorRT-LLM answers no request for one half only."""
    ours = {"backend": "NIXL", "kv_transfer_timeout_ms": context.plan.model.kv_lease * 1000}
    key, given = args.get(_TRANSFER, (_TRANSFER, {}))
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be a mapping", hint="such as `{max_tokens_in_buffer: 16384}`")
    for name in ours:
        if name in given:
            raise ConfigError(
                f"{key}.{name}: hpcserve sets it itself",
                hint="hpcserve connects prefill and decode by NIXL; `kv_lease` is what can be set",
            )
    return {**ours, **given}


def _key(flag: str) -> str:
    return flag.replace("-", "_")


def _environment(context: EngineContext) -> dict[str, str]:
    """Later ones win: what hpcserve derives, the node's fabric, the site, model.yaml, the pool."""
    env = {**dict.fromkeys(_AS_ROOT, "1"), **variables.common(context)}
    interface = env.get("GLOO_SOCKET_IFNAME")
    if interface is not None and context.replica.role != "aggregated":
        # Whose address its NIXL agents tell each other (cpp/tensorrt_llm/common/envUtils.cpp).
        env.setdefault("TRTLLM_NIXL_INTERFACE", interface)
    env |= variables.given(context, OWN_VARIABLES)
    return env | variables.visible_gpus(context)
