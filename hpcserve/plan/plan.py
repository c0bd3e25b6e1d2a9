"""The Plan: everything about a job that is known before Slurm grants nodes.

A Plan is a pure function of model.yaml, the site config and the flags. It is written to
`plan.json` in the run directory, and the processes inside the job read it from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config.model import ModelSpec, Role
from ..config.site import Site

OriginKind = Literal["default", "site", "model.yaml", "flag", "environment", "derived"]

RENDEZVOUS_TIMEOUT = 120
"""Seconds the ranks wait for each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why one value is what it is; `hpcserve explain` prints these."""

    key: str
    value: str
    origin: OriginKind
    where: str
    """`model.yaml:4`, `--nodes`, `HPCSERVE_SITE`, or for derived values the reason in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One engine instance and where it runs."""

    name: str
    """`prefill-0`, `decode-1`, …: unique in the run, the same after a restart."""
    role: Role
    nodes: tuple[int, ...]
    """Ranks of the nodes that carry it, head of the replica first."""
    gpus: tuple[int, ...]
    """GPU indices used on each of its nodes; on `device: cpu`, the node's worker slots."""
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: bool

    def rank_name(self, rank: int) -> str:
        """Name of a data-parallel rank where it is a worker by itself."""
        return f"{self.name}#{rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a heterogeneous job, as Slurm calls it: nodes of one type, with ranks in a row."""

    node_type: str | None
    """One of the site's `node_types`; None: its `node`."""
    nodes: int
    slots_per_node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The dataset that a job is for; it ends with it."""

    output: str
    """Absolute path of the directory that the batch was planned in, on a file system of all nodes."""
    max_error_rate: float
    """0 to 1: part of the results that may be errors."""
    merge_apart: bool = False
    """Another job merges what the batch's own leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole job. Node ranks are 0 … nodes-1 and rank 0 is the head node."""

    name: str
    model: ModelSpec
    """model.yaml with every derived value filled in that does not depend on the run."""
    site: Site
    device: Literal["cuda", "cpu"]
    nodes: int
    slots_per_node: int
    """GPUs per node, or workers of engines per node on `device: cpu`; of the largest where nodes differ."""
    served_name: str
    walltime: int
    """Seconds."""
    ready_timeout: int
    """Seconds."""
    replicas: tuple[ReplicaPlan, ...]
    batch: BatchPlan | None = None
    """None: it serves whoever has a key, until its walltime ends."""
    components: tuple[Component, ...] = ()
    """In rank order, of a heterogeneous job; empty where all nodes are alike."""
    explanations: tuple[Explanation, ...] = ()

    @property
    def parts(self) -> tuple[Component, ...]:
        """The components; a job of one type of nodes is one."""
        whole = Component(node_type=None, nodes=self.nodes, slots_per_node=self.slots_per_node)
        return self.components or (whole,)

    @property
    def gpus(self) -> int:
        """GPUs the job is charged for."""
        if self.device != "cuda":
            return 0
        return sum(part.nodes * part.slots_per_node for part in self.parts)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.walltime / 3600

    def on_node(self, rank: int) -> tuple[ReplicaPlan, ...]:
        """The replicas that have a process on node `rank`."""
        return tuple(replica for replica in self.replicas if rank in replica.nodes)

    def with_role(self, role: Role) -> tuple[ReplicaPlan, ...]:
        return tuple(replica for replica in self.replicas if replica.role == role)

    @property
    def disaggregated(self) -> bool:
        return any(replica.role == "prefill" for replica in self.replicas)
