"""The nodes of each pool: all of one type, or of several types in one heterogeneous job.

Slurm's heterogeneous jobs: https://slurm.schedmd.com/heterogeneous_jobs.html. All components start together;
the batch script runs on the first node of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..config.model import Role, RoleSpec
from ..config.site import Site
from ..errors import PlanError
from .explain import Notes, count
from .limits import check_nodes
from .plan import Component
from .request import PlanRequest

Device = Literal["cuda", "cpu"]


def pool_sites(
    request: PlanRequest, site: Site, roles: Mapping[Role, RoleSpec], notes: Notes
) -> dict[Role, Site]:
    """The site as each pool's nodes show it. Raises PlanError for a type of nodes that it does not have."""
    sites: dict[Role, Site] = {}
    for role, spec in roles.items():
        try:
            sites[role] = site.with_nodes(spec.node_type)
        except KeyError:
            known = ", ".join(site.node_types) or "none"
            raise PlanError(
                f"{role}.node_type is {spec.node_type}, but the node_types of site {site.name} are: {known}",
                hint="name one of those, or describe it in the site config under `node_types`",
            ) from None
        own = sites[role].slurm.partition
        if request.partition is not None and own != request.partition:
            raise PlanError(
                f"--partition is {request.partition}, but {role} is on nodes of type {spec.node_type}, "
                f"which are in partition {own}",
                hint="leave --partition out, or change `node_types` of the site config",
            )
    if any(spec.node_type for spec in roles.values()):
        partitions = dict.fromkeys(at.slurm.partition for at in sites.values() if at.slurm.partition)
        if partitions:
            notes.derived("partition", ", ".join(partitions), "of the pools' node types")
    return sites


def differ(roles: Mapping[Role, RoleSpec]) -> bool:
    """Whether the pools are on different types of nodes."""
    return len({spec.node_type for spec in roles.values()}) > 1


def choose_device(
    request: PlanRequest, sites: Mapping[Role, Site], roles: Mapping[Role, RoleSpec], notes: Notes
) -> Device:
    """Where the engines of all pools compute."""
    asked = request.model.device
    bare = [role for role, site in sites.items() if site.node.gpus == 0]
    if bare and asked != "cpu" and (asked == "cuda" or len(bare) < len(sites)):
        chosen = roles[bare[0]].node_type
        nodes = f"of type {chosen} " if chosen else ""
        reason = "device is cuda" if asked == "cuda" else "the other pool's nodes have GPUs"
        raise PlanError(
            f"{reason}, but the nodes {nodes}of site {request.site.name} have no GPU",
            hint="use `device: cpu`, or another `--site`"
            if asked == "cuda" and not chosen
            else "use `device: cpu`, or nodes with GPUs for both pools",
        )
    if asked is not None:
        notes.model("device", asked)
        return asked
    device: Device = "cpu" if bare else "cuda"
    notes.site("device", device, "node.gpus")
    return device


def check_heterogeneous(site: Site, roles: Mapping[Role, RoleSpec], nodes: int) -> None:
    """What can't be done with pools on different types of nodes. Raises PlanError."""
    pools = " and ".join(f"{role} on {_named(spec)}" for role, spec in roles.items())
    obstacle = None
    if site.scheduler == "local":
        obstacle = "scheduler: local has one type of nodes", "leave `node_type` out"
    elif site.slurm.segment:
        obstacle = (
            "its segments would be of one component each",
            "set `slurm: {segment: false}` in the site config",
        )
    elif site.slurm.requeue:
        # Slurm 22.05 puts a component back alone after a failure of a node (kill_running_job_by_node_name).
        obstacle = (
            "Slurm would put its components back into the queue one by one",
            "set `slurm: {requeue: false}` in the site config",
        )
    elif site.slurm.gpu_request == "none":
        obstacle = (
            "slurm.gpu_request: none asks for no GPUs",
            "set `slurm: {gpu_request: gres}` in the site config",
        )
    if obstacle is not None:
        raise PlanError(f"{pools} is a heterogeneous job, but {obstacle[0]}", hint=obstacle[1])
    if nodes < len(roles):
        raise PlanError(
            f"{pools} need a node each, but the job has {nodes}",
            hint=f"use `--nodes {len(roles)}` or more, or one `node_type` for both",
        )


def components(
    sites: Mapping[Role, Site],
    roles: Mapping[Role, RoleSpec],
    counts: Mapping[Role, int],
    slots: Mapping[Role, int],
    notes: Notes,
) -> tuple[Component, ...]:
    """In rank order. Raises PlanError where one has too many nodes."""
    parts = []
    for role, spec in roles.items():
        check_nodes(sites[role], counts[role], f"{role} on {_named(spec)}")
        parts.append(Component(node_type=spec.node_type, nodes=counts[role], slots_per_node=slots[role]))
    told = ", ".join(
        f"{count(counts[role], 'node')} {_named(spec)} for {role}" for role, spec in roles.items()
    )
    alone = [role for role in roles if counts[role] == 1]
    reason = "the pools' node_type; one heterogeneous job"
    if alone:
        # kill_running_job_by_node_name of Slurm 22.05 to 24.11: a component of one node ends with any node.
        reason += f". A component of one node ({', '.join(alone)}) ends when any node of the job fails"
    notes.derived("components", told, reason)
    return tuple(parts)


def _named(spec: RoleSpec) -> str:
    return spec.node_type or "the site's `node`"
