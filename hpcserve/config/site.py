"""A site config: the facts about one cluster that a launch depends on.

Facts about a shared cluster go stale, so each section carries `source` (where the fact was read)
and `checked` (the date it was last compared with the cluster).
"""

# `key(…)` returns a dataclass field, so calling it in a default is meant.
# ruff: noqa: RUF009
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from .keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a section's facts come from."""

    source: str = key("URL, document or command the facts were read from.", "")
    checked: str = key("Date of the last comparison, YYYY-MM-DD.", "", pattern=r"|\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchSite(Provenance):
    hostnames: tuple[str, ...] = key(
        "Shell patterns; a login node whose name matches gets this site.",
        (),
        example='["login*.cluster.edu"]',
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSite(Provenance):
    """How this cluster wants jobs asked for. A key that is not set leaves its directive out."""

    gpu_request: Literal["gres", "gpus-per-node", "none"] = key(
        "How GPUs are asked for: `--gres=gpu:N`, `--gpus-per-node=N`, or not at all.",
        "gres",
        choices=("gres", "gpus-per-node", "none"),
    )
    gpu_type: str | None = key("Type in the request, as in `--gres=gpu:h100:8`.", None)
    partition: str | None = key("Default partition.", None)
    account: str | None = key("Default account.", None)
    account_required: bool = key("Refuse to submit without an account.", False)
    qos: str | None = key("Default QOS.", None)
    constraint: str | None = key("Node feature expression.", None)
    reservation: str | None = key("Reservation.", None)
    exclusive: bool = key("Ask for whole nodes.", True)
    memory: str | None = key("`--mem` per node; `0` asks for all of it.", None, pattern=r"\d+[KMGT]?")
    cpus_per_task: int | None = key("CPUs per node when nodes are shared.", None, minimum=1)
    segment: bool = key(
        "Ask for `--segment`, so that a replica stays inside one block, and a disaggregated job that fits"
        " inside one NVLink domain.",
        False,
    )
    max_walltime: int | None = key("Longest walltime the queue takes.", None, kind="duration", minimum=60)
    default_walltime: int = key("Walltime when nobody says.", 3600, kind="duration", minimum=60)
    max_nodes: int | None = key("Most nodes one job may ask for.", None, minimum=1)
    requeue: bool = key("May the job start again after a failure of its head node.", False)
    mpi: Literal["pmix", "pmi2", "cray_shasta", "none"] = key(
        "Plugin for the rendezvous step, and for TensorRT-LLM's replicas over several nodes"
        " (`srun --mpi=list`); `none` means use TCP, and none of these replicas.",
        "pmix",
        choices=("pmix", "pmi2", "cray_shasta", "none"),
    )
    kill_wait: int = key("Seconds between SIGTERM and SIGKILL (KillWait).", 30, minimum=1)
    cpu_partition: str | None = key(
        "Partition for jobs without GPUs, in which large batches are planned and merged. Not set: where the"
        " command runs, and in the batch's own job.",
        None,
    )
    cpu_memory: str | None = key("`--mem` of such a job.", None, pattern=r"\d+[KMGT]?")
    cpu_job_from: int = key("MiB of input from which a batch is large.", 512, minimum=0)
    extra: tuple[str, ...] = key("Further sbatch options, each `--name=value`.", (), pattern=r"--[a-z].*")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSite(Provenance):
    """One compute node."""

    gpus: int = key("GPUs per node; 0 for a CPU-only site.", minimum=0, maximum=64)
    gpu: str | None = key("GPU model, for people.", None)
    gpu_memory_gib: int | None = key("Memory of one GPU, in GiB.", None, minimum=1)
    cpus: int | None = key("CPU cores per node.", None, minimum=1)
    memory_gib: int | None = key("Memory of a node, in GiB, that a job may use.", None, minimum=1)
    cpu_engines: int = key(
        "Workers of engines one node may run when `device: cpu`: an engine has one for each rank.",
        1,
        minimum=1,
    )
    arch: Literal["x86_64", "aarch64"] = key(
        "Processor of the compute nodes.", "x86_64", choices=("x86_64", "aarch64")
    )
    nvlink_domain_nodes: int = key("Nodes that share one NVLink domain (18 on NVL72).", 1, minimum=1)
    internet: bool = key("Compute nodes reach the open internet.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType(Provenance):
    """Nodes of another type than `node`, for pools that name it.

    `partition`, `qos`, `memory` and `max_nodes` are those of `slurm` where they are not set. What describes
    the hardware is never that of `node` or `slurm`: a key that is not set is not known, or not asked for.
    """

    gpus: int = key("GPUs per node.", minimum=0, maximum=64)
    gpu: str | None = key("GPU model, for people.", None)
    gpu_memory_gib: int | None = key("Memory of one GPU, in GiB.", None, minimum=1)
    memory_gib: int | None = key("Memory of a node, in GiB, that a job may use.", None, minimum=1)
    cpu_engines: int = key("Engines one node may run when `device: cpu`.", 1, minimum=1)
    nvlink_domain_nodes: int = key("Nodes that share one NVLink domain (18 on NVL72).", 1, minimum=1)
    partition: str | None = key("Partition.", None)
    qos: str | None = key("QOS.", None)
    constraint: str | None = key("Node feature expression.", None)
    gpu_type: str | None = key("Type in the request, as in `--gres=gpu:l40s:4`.", None)
    memory: str | None = key("`--mem` per node.", None, pattern=r"\d+[KMGT]?")
    max_nodes: int | None = key("Most nodes a job may have of this type.", None, minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSite(Provenance):
    """The fabric KV blocks cross. HCA names are found on the node, never written here."""

    kind: Literal["infiniband", "roce", "slingshot", "ethernet", "loopback"] = key(
        "Interconnect between nodes.",
        "infiniband",
        choices=("infiniband", "roce", "slingshot", "ethernet", "loopback"),
    )
    control_interface: str | None = key(
        "Network interface whose address engines answer on. Default: the one that routes to the head node.",
        None,
    )
    env: Mapping[str, str] = key(
        "Transport variables for engines, such as UCX_*; they are above those found on the nodes.",
        factory=dict,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSite(Provenance):
    runtime: Literal["none", "pyxis", "apptainer"] = key(
        "How programs run on the nodes.", "none", choices=("none", "pyxis", "apptainer")
    )
    image: str | None = key(
        "Image with the engine, and with hpcserve unless `agent` is `outside`: a file that all nodes see, or "
        "an image of a registry, which `hpcserve image pull` fetches.",
        None,
        example="docker://nvcr.io/nvidia/vllm:25.09-py3",
    )
    cache: str = key(
        "Directory of pulled images, on a file system that all nodes share. ~ and $VARS are expanded.",
        "~/.hpcserve/images",
    )
    agent: Literal["inside", "outside"] = key(
        "Whether all of hpcserve runs in the container, or only the engines do and hpcserve runs in "
        "`setup.python` on the node (apptainer).",
        "inside",
        choices=("inside", "outside"),
    )
    python: str = key("Python of the image, for engines when `agent` is `outside`.", "python3")
    binds: tuple[str, ...] = key("`SOURCE:TARGET[:ro]` mounts.", ())
    args: tuple[str, ...] = key("Further flags of the runtime.", ())


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSite(Provenance):
    runs: str = key(
        "Directory of run directories, on a file system that all nodes share. ~ and $VARS are expanded.",
        "~/.hpcserve/runs",
    )
    node_local: str = key("Fast private directory on a node. $VARS are expanded there.", "/tmp")
    stage: bool = key("Stage models to `node_local`, unless model.yaml says otherwise with `stage`.", False)
    kv: str | None = key(
        "Directory of KV blocks that outlive a run (`kv_offload.shared_gib`): yours alone, on a file system"
        " that all nodes share. ~ and $VARS are expanded where the launch is typed.",
        None,
    )
    keep_staged: bool = key("Leave staged models on the nodes at a job's end, for the next one.", True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PortsSite(Provenance):
    low: int = key("First port hpcserve may bind.", 20000, minimum=1024, maximum=65535)
    high: int = key("Last port hpcserve may bind.", 29999, minimum=1024, maximum=65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginSite(Provenance):
    host: str | None = key("Host name for `ssh -L` tunnels from outside.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupSite(Provenance):
    """What makes `python` with hpcserve and the engine available on a node."""

    modules: tuple[str, ...] = key("`module load` names, in order.", ())
    script: str = key("Bash lines run before hpcserve, such as activating an environment.", "", kind="text")
    python: str = key("Python that has hpcserve; the one that runs `hpcserve launch` when empty.", "")
    env: Mapping[str, str] = key("Environment of the whole job.", factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One cluster."""

    name: str = key("Name of the site: its file's name without `.yaml`.", pattern=r"[a-z0-9][a-z0-9-]*")
    description: str = key("One line for people.", "")
    scheduler: Literal["slurm", "local"] = key(
        "Who starts the processes.", "slurm", choices=("slurm", "local")
    )
    match: MatchSite = key("How the site is recognised.", factory=MatchSite)
    slurm: SlurmSite = key("How jobs are asked for.", factory=SlurmSite)
    node: NodeSite = key("One compute node.")
    node_types: Mapping[str, NodeType] = key(
        "Other types of nodes, by a name that pools of model.yaml give as `node_type`.", factory=dict
    )
    network: NetworkSite = key("The interconnect.", factory=NetworkSite)
    container: ContainerSite = key("Containers.", factory=ContainerSite)
    storage: StorageSite = key("File systems.", factory=StorageSite)
    ports: PortsSite = key("Ports.", factory=PortsSite)
    login: LoginSite = key("The login host.", factory=LoginSite)
    setup: SetupSite = key("Software on the nodes.", factory=SetupSite)
    gpu_hour_rate: float | None = key("Service units charged per GPU-hour.", None, minimum=0)

    def with_nodes(self, node_type: str | None) -> Site:
        """The site as it is for a job on nodes of this type; None: on those of `node`. Raises KeyError."""
        if node_type is None:
            return self
        chosen = self.node_types[node_type]
        node = replace(self.node, **{name: getattr(chosen, name) for name in _NODE_OF_A_TYPE})
        own = {name: getattr(chosen, name) for name in _SLURM_OF_A_TYPE}
        given = {name: value for name, value in own.items() if value is not None}
        slurm = replace(self.slurm, **given, constraint=chosen.constraint, gpu_type=chosen.gpu_type)
        return replace(self, node=node, slurm=slurm)


_NODE_OF_A_TYPE = ("gpus", "gpu", "gpu_memory_gib", "memory_gib", "cpu_engines", "nvlink_domain_nodes")
_SLURM_OF_A_TYPE = ("partition", "qos", "memory", "max_nodes")
