"""Where KV blocks that left the GPUs are kept, how much of them, and each engine's share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    request: PlanRequest, sites: Iterable[Site], replicas: Sequence[ReplicaPlan], notes: Notes
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
    _check_files(spec, replicas)
    if spec.disk_gib is not None:
        notes.model("kv_offload.disk_gib", spec.disk_gib)
    if spec.shared_gib is not None:
        if request.site.storage.kv is None:
            raise PlanError(
                f"kv_offload.shared_gib is set, but site {request.site.name} does not say where",
                hint="set `storage: {kv: …}` in the site config to a directory of yours on a file system that"
                " all nodes share",
            )
        notes.model("kv_offload.shared_gib", spec.shared_gib)
        notes.site("storage.kv", request.site.storage.kv, "storage.kv")
    if spec.answers:
        notes.model("kv_offload.answers", spec.answers)
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


def _check_files(spec: KvOffloadSpec, replicas: Sequence[ReplicaPlan]) -> None:
    """vLLM 0.32 reads and writes a rank's files on the rank's first node (v1/kv_offload/tiering/spec.py,
    get_manager), from memory in which only the workers of that node put their parts."""
    for name in ("disk_gib", "shared_gib"):
        wide = next((one for one in replicas if len(one.nodes) > one.data_parallel), None)
        if getattr(spec, name) is not None and wide is not None:
            raise PlanError(
                f"kv_offload.{name} is set, but a rank of {wide.name} spans "
                f"{len(wide.nodes) // wide.data_parallel} nodes, and vLLM writes the first one's part alone",
                hint=f"leave `kv_offload.{name}` out, or choose a `tensor_parallel` and `pipeline_parallel` "
                "that fit on one node",
            )


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


def shared_bytes(plan: Plan) -> int:
    """Of the whole directory that runs share; 0: no such tier."""
    spec = plan.model.kv_offload
    return 0 if spec is None else int((spec.shared_gib or 0.0) * GIB)


def kv_writers(plan: Plan) -> int:
    """Processes of a run that write into it: each data-parallel rank's scheduler."""
    return sum(replica.data_parallel for replica in plan.replicas)


def _neighbours(plan: Plan, replica: ReplicaPlan) -> int:
    """Replicas that share a node with it, itself included, where they are most."""
    return max(len(plan.on_node(node)) for node in replica.nodes)
