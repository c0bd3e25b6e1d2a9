"""How much of a node's memory and disk keeps KV blocks that left the GPUs, and each engine's share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..config.model import KvOffloadSpec
from ..config.site import Site
from ..errors import PlanError
from .abilities import ABILITIES
from .explain import Notes
from .memory import GIB
from .plan import Plan, ReplicaPlan
from .request import PlanRequest

CPU_SHARE = 0.4
"""Part of the node's memory by default. The blocks lie in /dev/shm, which Linux makes half of it."""
MOST_CPU = 0.8
"""Part that can be asked for: engines, and files they have read, need memory as well."""


def choose_offload(
    request: PlanRequest, sites: Iterable[Site], device: str, notes: Notes
) -> KvOffloadSpec | None:
    """`kv_offload` with its size filled in; `sites` as the pools' nodes show them. Raises PlanError."""
    spec = request.model.kv_offload
    if spec is None:
        return None
    # One size is for all nodes, so the smallest tells.
    known = [site.node.memory_gib for site in sites]
    memory = None if None in known else min(size for size in known if size is not None)
    able = ABILITIES[request.model.engine]
    if not able.kv_offload:
        raise PlanError(
            f"kv_offload is set, but hpcserve has no KV tiers for {able.title}",
            hint="leave `kv_offload` out, or use `engine: vllm`",
        )
    if spec.disk_gib is not None and device == "cpu":
        raise PlanError(
            "kv_offload.disk_gib is set, but on device cpu vLLM has no disk tier",
            hint="leave `kv_offload.disk_gib` out",
        )
    if spec.disk_gib is not None:
        notes.model("kv_offload.disk_gib", spec.disk_gib)
    if spec.cpu_gib is not None:
        if memory is not None and spec.cpu_gib > MOST_CPU * memory:
            raise PlanError(
                f"kv_offload.cpu_gib is {spec.cpu_gib:g}, but a node has {memory} GiB of memory",
                hint=f"set it to {MOST_CPU * memory:.0f} or less; "
                f"{CPU_SHARE * memory:.0f} is the default here",
            )
        notes.model("kv_offload.cpu_gib", spec.cpu_gib)
        return spec
    if memory is None:
        raise PlanError(
            "kv_offload.cpu_gib is not set, and site "
            f"{request.site.name} does not say how much memory its nodes have",
            hint="set `kv_offload: {cpu_gib: …}`, or `node: {memory_gib: …}` in the site config",
        )
    size = round(CPU_SHARE * memory, 1)
    notes.derived("kv_offload.cpu_gib", f"{size:g}", f"{CPU_SHARE:.0%} of the node's {memory} GiB")
    return replace(spec, cpu_gib=size)


def cpu_bytes(plan: Plan, replica: ReplicaPlan) -> int:
    """What vLLM is told for one data-parallel rank of a replica; 0: no KV tiers.

    A rank that spans nodes makes a file of this size on each of them, and fills its own part of it
    (v1/kv_offload/cpu/shared_offload_region.py): so this is never more than one node's share.
    """
    spec = plan.model.kv_offload
    if spec is None:
        return 0
    ranks = max(1.0, replica.data_parallel / len(replica.nodes))
    return int((spec.cpu_gib or 0.0) * GIB / ranks / _neighbours(plan, replica))


def disk_bytes(plan: Plan, replica: ReplicaPlan) -> int:
    """Disk of one replica on each of its nodes; 0: no disk tier."""
    spec = plan.model.kv_offload
    return 0 if spec is None else int((spec.disk_gib or 0.0) * GIB / _neighbours(plan, replica))


def _neighbours(plan: Plan, replica: ReplicaPlan) -> int:
    """Replicas that share a node with it, itself included, where they are most."""
    return max(len(plan.on_node(node)) for node in replica.nodes)
