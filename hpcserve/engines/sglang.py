"""SGLang 0.5.23: command line, environment, and log lines. Its request protocol is in `pair_protocol.py`.

Files named in comments are SGLang's, below sglang/srt/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..plan.plan import ReplicaPlan
from . import arguments, progress, variables
from .base import EngineCommand, EngineContext
from .kv_events import endpoints
from .pair_protocol import BOOTSTRAP_PORT, PairEngine
from .sglang_host_kv import VARIABLE as HOST_KV
from .sglang_server import KEY_VARIABLE, OPEN_DOORS

_INSIDE = "engines are reached through the router only; `router.port` is the endpoint's port"
_SIZES = "use `tensor_parallel`, `pipeline_parallel`, `data_parallel` and `nodes` of the pool"
_KEYS = "the engines' key is made by hpcserve; `router.auth` is about the clients' key"
_KV = "hpcserve connects prefill and decode by NIXL"
_UNGUARDED = "hpcserve guards the engine's one HTTP server with its key; others would stand open"
RESERVED: Mapping[str, str] = {
    "model-path": "use the top-level key `model`",
    "served-model-name": "use the top-level key `served_name`",
    "revision": "use the top-level key `revision`",
    "dtype": "use the top-level key `dtype`",
    "quantization": "use the top-level key `quantization`",
    "context-length": "use the top-level key `max_model_len`",
    "device": "use the top-level key `device`",
    "host": _INSIDE,
    "port": _INSIDE,
    "fastapi-root-path": _INSIDE,
    "ssl-keyfile": _INSIDE,
    "ssl-certfile": _INSIDE,
    "api-key": _KEYS,
    "admin-api-key": _KEYS,
    "smg-grpc-mode": _UNGUARDED,
    "grpc-mode": _UNGUARDED,
    "grpc-port": _UNGUARDED,
    "sidecar": _UNGUARDED,
    "use-ray": _UNGUARDED,
    "encoder-only": _UNGUARDED,
    "language-only": _UNGUARDED,
    "gated-launch-port": "engines start at once: nobody would open the gate",
    "tokenizer-worker-num": "SGLang knows no key with several tokenizer processes",
    "config": "write the file's settings into `engine_args`",
    "nnodes": _SIZES,
    "node-rank": _SIZES,
    "dist-init-addr": _SIZES,
    "nccl-init-addr": _SIZES,
    "nccl-port": _SIZES,
    "tp-size": _SIZES,
    "tensor-parallel-size": _SIZES,
    "pp-size": _SIZES,
    "pipeline-parallel-size": _SIZES,
    "dp-size": _SIZES,
    "data-parallel-size": _SIZES,
    "attn-dp-size": _SIZES,
    "attention-data-parallel-size": _SIZES,
    "enable-dp-attention": _SIZES,
    "base-gpu-id": _SIZES,
    "ep-size": "use `expert_parallel` of the pool",
    "expert-parallel-size": "use `expert_parallel` of the pool",
    "disaggregation-mode": "use the pools `prefill`, `decode` and `aggregated`",
    "disaggregation-transfer-backend": _KV,
    "disaggregation-bootstrap-port": _KV,
    "enable-pd-role-switch": "a replica keeps the role of its pool",
    "enable-metrics": "READY is proven with the engine's metrics, so they stay on",
}
_CORES = "SGLANG_CPU_OMP_THREADS_BIND"
OWN_VARIABLES = frozenset({KEY_VARIABLE, *OPEN_DOORS, HOST_KV, "SGLANG_HOST_IP", "CUDA_VISIBLE_DEVICES"})

DIST_PORTS = 14
"""SGLang counts up from the port of `--dist-init-addr`: six for its own processes (server_args.py, PortArgs)
and, 13 above it, the one that tells other nodes of them (DP_ATTENTION_HANDSHAKE_PORT_DELTA)."""
CPU_KV_TOKENS = 32768
"""SGLang would take most of the node's memory for the KV cache of each engine on device cpu."""
_RETRACTION = "disaggregation-decode-retraction-backup"
_RADIX_ON_DECODE = "disaggregation-decode-enable-radix-cache"

_PROGRESS: tuple[progress.Says, ...] = (
    (re.compile(r"Loading .*?shards.*?:\s+\d+% Completed \| (\d+)/(\d+)"), r"weights \1/\2"),
    (re.compile(r"Load weight begin"), "loading weights"),
    (re.compile(r"Load weight end\. elapsed=([\d.]+) s"), r"weights loaded in \1 s"),
    (re.compile(r"max_total_num_tokens=(\d+)"), r"KV cache of \1 tokens"),
    (re.compile(r"Capturing batches.*?\| (\d+)/(\d+)"), r"CUDA graphs \1/\2"),
    (re.compile(r"Start of pd disaggregation warmup"), "warming up"),
    (re.compile(r"The server is fired up and ready to roll"), "answering"),
)


class SGLang(PairEngine):
    name = "sglang"
    key_variable = KEY_VARIABLE
    # /health generates a token, and answers a second later at best (entrypoints/http_server.py).
    health_path = "/ready"
    # All ranks of a prefill replica announce themselves to the bootstrap server of its head.
    shared_ports = frozenset({"dist", BOOTSTRAP_PORT})

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        """Further nodes of a replica have an HTTP server as well, which tells health and metrics only."""
        ports = {"http": 1}
        if replica.role == "prefill":
            ports[BOOTSTRAP_PORT] = 1
        if _attends_apart(replica) or len(replica.nodes) > 1:
            ports["dist"] = DIST_PORTS
        elif replica.data_parallel == 1:
            # Several ranks want one each, and can't be told (managers/data_parallel_controller.py).
            ports["nccl"] = 1
        return ports

    def command(self, context: EngineContext) -> EngineCommand:
        """Raises ConfigError when `engine_args` or `env` sets what hpcserve sets."""
        argv = [context.python, "-m", "hpcserve.engines.sglang_server", *_argv(context)]
        if self.kv_event_endpoints(context):
            argv += ["--kv-events-config", arguments.compact(endpoints.publisher(context.scratch))]
        argv += arguments.flags(_given(context))
        return EngineCommand(argv=tuple(argv), env=_environment(context))

    def kv_event_endpoints(self, context: EngineContext) -> tuple[endpoints.EventEndpoint, ...]:
        """() as well where `engine_args` say themselves what becomes of the events, and on decode replicas,
        which by default keep no prefixes."""
        args, replica = _given(context), context.replica
        if "kv-events-config" in args or (replica.role == "decode" and _RADIX_ON_DECODE not in args):
            return ()
        # Of several pipeline stages, the first publishes (disaggregation/kv_events.py, is_kv_publisher_rank).
        nodes = max(1, len(replica.nodes) // replica.pipeline_parallel)
        if context.node >= nodes:
            return ()
        ranks = endpoints.ranks_on(context.node, nodes=nodes, ranks=replica.data_parallel)
        return endpoints.in_directory(context.scratch, ranks)

    def progress(self, line: str) -> str | None:
        return progress.told(line, _PROGRESS)


def _given(context: EngineContext) -> dict[str, tuple[str, object]]:
    """`engine_args` of model.yaml for this replica."""
    model, role = context.plan.model, context.replica.role
    return arguments.merge(role, model.engine_args, variables.pool(context).engine_args)


def _attends_apart(replica: ReplicaPlan) -> bool:
    """Are the data-parallel ranks of one tensor-parallel group, and only their attention apart?

    So that experts are spread over all of them, and wherever a replica has several nodes: SGLang refuses
    whole copies of a model there (arg_groups/validation_hook.py).
    """
    return replica.data_parallel > 1 and (replica.expert_parallel or len(replica.nodes) > 1)


def _argv(context: EngineContext) -> Iterator[str]:
    plan, ports, replica = context.plan, context.ports, context.replica
    args = _given(context)
    arguments.refuse(args, RESERVED, "SGLang")
    yield from ("--model-path", context.model_path, "--served-model-name", plan.served_name)
    yield from ("--host", context.address, "--port", ports["http"])
    for key, flag in (
        ("revision", "revision"),
        ("dtype", "dtype"),
        ("quantization", "quantization"),
        ("max_model_len", "context-length"),
    ):
        value = getattr(plan.model, key)
        if value is not None:
            yield from (f"--{flag}", str(value))
    if plan.device == "cpu":
        yield from _on_cpu(replica.role, args)
    yield from _parallel(context)
    if replica.role != "aggregated":
        yield from ("--disaggregation-mode", replica.role, "--disaggregation-transfer-backend", "nixl")
    if replica.role == "prefill":
        yield from ("--disaggregation-bootstrap-port", ports[BOOTSTRAP_PORT])
    yield "--enable-metrics"
    # The router learns from each answer's usage how well its prediction of prefix hits was.
    if "enable-cache-report" not in args:
        yield "--enable-cache-report"
    if "uvicorn-access-log-exclude-prefixes" not in args:
        yield from ("--uvicorn-access-log-exclude-prefixes", "/ready", "/metrics")


def _on_cpu(role: str, given: Mapping[str, object]) -> Iterator[str]:
    """What SGLang's wheel can do without a GPU: its kernels for CPUs are not in it, nor is CUDA there to wait
    for a copy with (disaggregation/prefill.py, with the overlap schedule) or to pin memory with."""
    yield from ("--device", "cpu")
    if "attention-backend" not in given:
        yield from ("--attention-backend", "torch_native")
    if not {"max-total-tokens", "mem-fraction-static"} & set(given):
        yield from ("--max-total-tokens", str(CPU_KV_TOKENS))
    if role != "aggregated" and "disable-overlap-schedule" not in given:
        yield "--disable-overlap-schedule"
    if role == "decode" and _RETRACTION not in given:
        yield from (f"--{_RETRACTION}", "cpu_tensor")


def _parallel(context: EngineContext) -> Iterator[str]:
    replica, ports = context.replica, context.ports
    together = _attends_apart(replica)
    tensor = replica.tensor_parallel * (replica.data_parallel if together else 1)
    yield from ("--tp-size", str(tensor))
    if replica.pipeline_parallel > 1:
        yield from ("--pp-size", str(replica.pipeline_parallel))
    if replica.data_parallel > 1:
        yield from ("--attn-dp-size" if together else "--dp-size", str(replica.data_parallel))
    if replica.expert_parallel:
        yield from ("--ep-size", str(tensor))
    if len(replica.nodes) > 1:
        yield from ("--nnodes", str(len(replica.nodes)), "--node-rank", str(context.node))
    if "dist" in ports:
        # Prefill ranks announce themselves at this address, where the bootstrap server is.
        yield from ("--dist-init-addr", f"{_host(context.head_address)}:{ports['dist']}")
    if "nccl" in ports:
        yield from ("--nccl-port", ports["nccl"])


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _threads(cores: tuple[int, ...]) -> dict[str, str]:
    """SGLang binds its threads to cores only where its kernels for CPUs are (distributed/bootstrap.py,
    _init_cpu_threads_env). Elsewhere PyTorch's pool would have a thread for each core of the machine, and
    pools that share cores wait for each other at the end of every operation."""
    return {_CORES: ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}


def _environment(context: EngineContext) -> dict[str, str]:
    """Later ones win: what hpcserve derives, the node's fabric, the site, model.yaml, the pool."""
    env = {"SGLANG_CACHE_DIR": f"{context.scratch}/sglang", **variables.common(context)}
    if context.plan.device == "cpu":
        if context.replica.role != "aggregated":
            env[HOST_KV] = "1"
        # On the CPU an engine of SGLang is one worker (plan/abilities.py).
        for cores in filter(None, context.cpus):
            env |= _threads(cores)
    env |= variables.given(context, OWN_VARIABLES)
    # Where decode engines find the ranks of a prefill engine (disaggregation/common/conn.py).
    env["SGLANG_HOST_IP"] = context.address
    return env | variables.visible_gpus(context)
