"""model.yaml: what to serve. Only `model` is required; None means "derive it"."""

# `key(…)` returns a dataclass field, so calling it in a default is meant.
# ruff: noqa: RUF009
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .keys import key

Role = Literal["prefill", "decode", "aggregated"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "aggregated")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One pool of engines: all its prefill, all its decode, or all its aggregated replicas."""

    nodes: int | None = key("Nodes for the whole pool.", None, minimum=1)
    node_type: str | None = key(
        "Type of the pool's nodes, one of the site's `node_types`. Pools of different types are one"
        " heterogeneous job. Default: the site's `node`.",
        None,
    )
    replicas: int | None = key("Engine instances in the pool.", None, minimum=1)
    tensor_parallel: int | None = key("GPUs that share each layer.", None, minimum=1)
    pipeline_parallel: int = key("Stages the layers are split into.", 1, minimum=1)
    data_parallel: int = key("Data-parallel ranks inside one replica.", 1, minimum=1)
    expert_parallel: bool = key("Spread the experts of a MoE model over the replica's GPUs.", False)
    engine_args: Mapping[str, Any] = key(
        "Engine flags for this pool only; they win over the top-level `engine_args`.",
        factory=dict,
        example="{max-num-seqs: 256}",
    )
    env: Mapping[str, str] = key("Environment for this pool's engines only.", factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What the requests look like; it steers the prefill:decode ratio."""

    input_tokens: int | None = key("Mean prompt length, in tokens.", None, minimum=1)
    output_tokens: int | None = key("Mean answer length, in tokens.", None, minimum=1)
    requests_per_second: float | None = key("Expected arrival rate.", None, minimum=0)


Policy = Literal["kv", "round_robin", "least_load", "power_of_two", "consistent_hash", "prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """The OpenAI endpoint on the head node."""

    port: int | None = key(
        "Port of the endpoint. Default: a free one in the site's range.", None, minimum=1, maximum=65535
    )
    policy: Policy = key(
        "How replicas are chosen. `kv`: where it costs the least time, by queues, cached prompts, KV"
        " transfers and the requests already there. `least_load` was `least_in_flight` before.",
        "kv",
        choices=get_args(Policy),
    )
    processes: int = key(
        "Router processes on the port. One serves some thousand requests a second.", 1, minimum=1, maximum=64
    )
    queue_seconds: int = key(
        "Longest expected wait, in seconds, for which a request is queued when the engines are full; others"
        " are refused at once with 429. Batch requests may wait ten times as long.",
        2,
        minimum=1,
        maximum=600,
    )
    auth: bool = key("Ask clients for the run's API key.", True)
    max_body_mib: int = key("Largest request body, in MiB.", 64, minimum=1, maximum=4096)
    first_byte_timeout: int = key(
        "Seconds a stream's first byte, or the computed prompt of a prefill replica, may take before another"
        " replica is tried. Answers that are not streamed may take any time.",
        600,
        minimum=1,
        kind="duration",
    )
    retries: int = key("Other replicas to try before the first byte.", 2, minimum=0, maximum=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvOffloadSpec:
    """Where KV blocks go that GPUs have no room for any more. Sizes are a node's, for all its replicas."""

    cpu_gib: float | None = key(
        "Memory of a node, in GiB. Default: 40% of what the site says it has.", None, minimum=0.001
    )
    disk_gib: float | None = key(
        "Disk of a node, in GiB, in the site's `storage.node_local`. Default: none.", None, minimum=0.001
    )
    shared_gib: float | None = key(
        "Size, in GiB, of the site's `storage.kv`, where KV blocks outlive the run, and all replicas and"
        " later runs find them; other models' and other runs' blocks there count as well. Default: none.",
        None,
        minimum=0.001,
    )
    answers: bool = key(
        "Keep the KV blocks of answers as well as those of prompts, for conversations that go on.", False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The whole of model.yaml."""

    model: str = key(
        "Hub id (`org/name`) or a path that every node can read.", example="/models/Llama-3.3-70B"
    )
    served_name: str | None = key(
        "Name clients put in `model`. Default: the last part of `model`.", None, pattern=r"[\w.\-/:]+"
    )
    engine: Literal["vllm", "sglang", "tensorrt-llm", "fake"] = key(
        "The server program of each replica.", "vllm", choices=("vllm", "sglang", "tensorrt-llm", "fake")
    )
    engine_args: Mapping[str, Any] = key(
        "Flags handed to the engine as they are; `true` gives a bare flag.",
        factory=dict,
        example="{gpu-memory-utilization: 0.9, enable-chunked-prefill: true}",
    )
    device: Literal["cuda", "cpu"] | None = key(
        "Where the engines compute. Default: what the site's nodes have.", None, choices=("cuda", "cpu")
    )
    revision: str | None = key("Hub revision: a commit, tag or branch.", None)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = key(
        "Weights and activations.", None, choices=("auto", "bfloat16", "float16", "float32")
    )
    quantization: str | None = key("The engine's name for a quantization method.", None)
    max_model_len: int | None = key("Longest prompt plus answer, in tokens.", None, minimum=16)
    prefill: RoleSpec | None = key("The pool that computes prompts.", None)
    decode: RoleSpec | None = key("The pool that writes answers.", None)
    aggregated: RoleSpec | None = key(
        "A pool that does both; use it instead of `prefill` and `decode`.", None
    )
    nodes: int | None = key("Nodes of the job; `--nodes` wins.", None, minimum=1)
    walltime: int | None = key(
        "How long the job may run.", None, kind="duration", minimum=60, example="04:00:00"
    )
    ready_timeout: int | None = key(
        "Longest wait for engines to load before the launch is called failed.",
        None,
        kind="duration",
        minimum=1,
    )
    drain: int = key(
        "How long before the end of the walltime new requests are refused so that running ones finish.",
        120,
        kind="duration",
        minimum=0,
    )
    site: str | None = key("Site config to use; `--site` and HPCSERVE_SITE win.", None)
    env: Mapping[str, str] = key("Environment of every engine.", factory=dict)
    workload: WorkloadSpec = key("What the requests look like.", factory=WorkloadSpec)
    router: RouterSpec = key("The endpoint on the head node.", factory=RouterSpec)
    kv_lease: int = key(
        "Seconds a prefill engine keeps a finished prompt's KV blocks for a decode engine.",
        30,
        minimum=5,
        kind="duration",
    )
    kv_offload: KvOffloadSpec | None = key(
        "Keep KV blocks in the nodes' memory, on their disks and on a shared file system, when the GPUs have"
        " no room for them.",
        None,
    )
    kv_preflight: bool = key(
        "Before models are loaded, move a test buffer by NIXL between all prefill and decode nodes, and warn"
        " of links that are slow or cut.",
        True,
    )
    stage: bool | None = key(
        "Copy a model that is a path to `storage.node_local` of each node first: it is read once from the"
        " shared file system and passed on from node to node. Default: `storage.stage` of the site.",
        None,
    )
    group: str | None = key(
        "Unix group that may read the run directory and the key. Default: nobody but you.", None
    )
