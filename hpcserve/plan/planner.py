"""PlanRequest -> Plan, or a PlanError that names the flag or key to change. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..config.model import Role, RoleSpec
from ..config.site import Site
from ..errors import PlanError
from .components import (
    Device,
    check_heterogeneous,
    choose_device,
    components,
    differ,
    pool_sites,
)
from .explain import Notes, duration
from .limits import check_kv_path, check_nodes, check_site, check_step, check_walltime
from .memory import GIB
from .offload import choose_offload
from .pair import check_pair
from .parallel import Machine, Shape, choose_shape
from .placement import place_pair, place_pool, size_pool
from .plan import Plan, ReplicaPlan
from .ratio import prefill_share
from .request import PlanRequest
from .roles import Wish, choose_roles, count_nodes, fewest, share_nodes, wished_nodes

LOAD_BYTES_PER_SECOND = 200e6
"""Slowest file system that a launch waits for: weights over a busy parallel file system."""


def make_plan(request: PlanRequest) -> Plan:
    """Plan a job. Raises PlanError; reads no clock, file, network or Slurm."""
    notes = Notes(request)
    site = _site(request, notes)
    check_site(site)
    model = request.model
    roles = choose_roles(request, notes)
    sites = pool_sites(request, site, roles, notes)
    different = differ(roles)
    if not different:
        site = next(iter(sites.values()))
    device = choose_device(request, sites, roles, notes)
    slots = {role: at.node.gpus if device == "cuda" else at.node.cpu_engines for role, at in sites.items()}
    notes.model("model", model.model)
    served_name = _served_name(request, notes)
    wishes = wished_nodes(request, roles)
    nodes = count_nodes(request, roles, wishes, slots, notes, alike=not different)
    if different:
        check_heterogeneous(site, roles, nodes)
        if request.nodes is None and model.nodes is None:
            wishes |= fewest(roles, wishes, slots)
    else:
        check_nodes(site, nodes, "--nodes" if request.nodes is not None else "model.yaml")
    walltime = _walltime(request, notes)
    ready_timeout = _ready_timeout(request, walltime, notes)
    if len(roles) == 2:
        check_kv_path(site, model.engine, nodes)
    placed, pool_nodes = _place(request, sites, roles, wishes, nodes, slots, device, notes)
    stage = _stage(request, notes)
    kv_offload = choose_offload(request, sites.values(), placed, notes)
    used = {
        role: _slots_asked(
            at, device, slots[role], [one for one in placed if not different or one.role == role]
        )
        for role, at in sites.items()
    }
    sized = {role: _filled(roles[role], pool_nodes[role], placed, role) for role in roles}
    return Plan(
        name=_name(request, served_name, notes),
        model=replace(
            model,
            served_name=served_name,
            device=device,
            nodes=nodes,
            walltime=walltime,
            ready_timeout=ready_timeout,
            kv_offload=kv_offload,
            stage=stage,
            **sized,  # type: ignore[arg-type]
        ),
        site=site,
        device=device,
        nodes=nodes,
        slots_per_node=max(used.values()),
        served_name=served_name,
        walltime=walltime,
        ready_timeout=ready_timeout,
        replicas=tuple(placed),
        batch=request.batch,
        components=components(sites, roles, pool_nodes, used, notes) if different else (),
        explanations=notes.all(),
    )


def _site(request: PlanRequest, notes: Notes) -> Site:
    """The site with the flags that override it."""
    slurm = request.site.slurm
    for key in ("account", "partition"):
        flag = getattr(request, key)
        if flag is not None:
            slurm = replace(slurm, **{key: flag})
            notes.flag(key, flag, f"--{key}")
        elif getattr(slurm, key) is not None:
            notes.site(key, getattr(slurm, key), f"slurm.{key}")
    notes.site("site", request.site.name, "name")
    return replace(request.site, slurm=slurm)


def _served_name(request: PlanRequest, notes: Notes) -> str:
    if request.model.served_name is not None:
        notes.model("served_name", request.model.served_name)
        return request.model.served_name
    name = request.model.model.rstrip("/").rsplit("/", 1)[-1]
    notes.derived("served_name", name, "the last part of `model`")
    return name


def _name(request: PlanRequest, served_name: str, notes: Notes) -> str:
    if request.name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", request.name):
            raise PlanError(
                f"--name is {request.name!r}; allowed are up to 64 letters, digits, `.`, `_` and `-`",
                hint="use a name such as `--name llama-eval`",
            )
        notes.flag("name", request.name, "--name")
        return request.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", served_name).strip("-._")[:64].lower() or "hpcserve"
    notes.derived("name", name, "from served_name")
    return name


def _walltime(request: PlanRequest, notes: Notes) -> int:
    model, site = request.model, request.site
    if request.walltime is not None:
        walltime, where = request.walltime, "--walltime"
        notes.flag("walltime", duration(walltime), where)
    elif model.walltime is not None:
        walltime, where = model.walltime, "walltime in model.yaml"
        notes.model("walltime", duration(walltime))
    else:
        walltime, where = site.slurm.default_walltime, "slurm.default_walltime of the site"
        notes.site("walltime", duration(walltime), "slurm.default_walltime")
    check_walltime(site, model, walltime, where)
    return walltime


def _ready_timeout(request: PlanRequest, walltime: int, notes: Notes) -> int:
    """Longest wait for READY, clamped so that a slow start is a diagnosis and not a Slurm kill."""
    most = walltime * 9 // 10
    given = request.model.ready_timeout
    if given is not None:
        if given > most:
            raise PlanError(
                f"ready_timeout is {given} s, but the walltime is only {walltime} s",
                hint=f"set `ready_timeout` to {most} s or less, or raise `--walltime`",
            )
        notes.model("ready_timeout", given)
        return given
    weights = request.facts.weight_bytes if request.facts else None
    wait = 600 + int((weights or 0) / LOAD_BYTES_PER_SECOND) if weights else 1800
    reason = (
        f"10 min and {weights / GIB:.0f} GiB of weights at {LOAD_BYTES_PER_SECOND / 1e6:.0f} MB/s"
        if weights
        else "30 min, as the size of the weights is not known"
    )
    if wait > most:
        wait, reason = most, "90% of the walltime"
    notes.derived("ready_timeout", wait, reason)
    return wait


def _stage(request: PlanRequest, notes: Notes) -> bool:
    """Is the model copied to the nodes' own disks? Only one that is a path can be."""
    asked, wished, path = request.model.stage, request.site.storage.stage, request.model.model
    absolute = path.startswith("/")
    if asked and not absolute:
        raise PlanError(
            f"stage is true, but model is {path}: only a model that is an absolute path can be staged",
            hint="download it to a directory that all nodes can read, and name that as `model`;"
            " or leave `stage` out",
        )
    if asked is not None:
        notes.model("stage", str(asked).lower())
        return asked
    if wished and not absolute:
        notes.derived("stage", "false", "`model` is not an absolute path")
    elif wished:
        notes.site("stage", "true", "storage.stage")
    return wished and absolute


def _place(
    request: PlanRequest,
    sites: dict[Role, Site],
    roles: dict[Role, RoleSpec],
    wishes: dict[Role, Wish],
    nodes: int,
    slots: dict[Role, int],
    device: Device,
    notes: Notes,
) -> tuple[list[ReplicaPlan], dict[Role, int]]:
    """Replicas in rank order, and the nodes of each pool."""
    model = request.model
    site = next(iter(sites.values()))
    one_node_pair = len(roles) == 2 and nodes == 1
    if one_node_pair and slots["prefill"] < 2:
        unit = "GPU" if device == "cuda" else "worker slot"
        raise PlanError(
            f"prefill and decode need one {unit} each, but the job has one node with {slots['prefill']}",
            hint="use `--nodes 2`, or an `aggregated:` pool",
        )
    machines = {
        role: Machine(
            slots=slots[role],
            gpu_bytes=at.node.gpu_memory_gib * GIB if at.node.gpu_memory_gib else None,
            device=device,
            engine=model.engine,
        )
        for role, at in sites.items()
    }
    shapes: dict[Role, Shape] = {}
    for role, spec in roles.items():
        machine = machines[role]
        room = replace(machine, slots=_room(role, roles, slots[role])) if one_node_pair else machine
        shapes[role] = choose_shape(
            role,
            spec,
            request.facts,
            room,
            slots[role],
            notes,
            partner=_partner(role, roles) if one_node_pair else None,
        )
        check_step(site, model.engine, role, shapes[role].span, alike=not differ(roles))
    if len(roles) == 2:
        check_pair(model.engine, shapes, request.facts)
    may_idle = device == "cpu" or (site.scheduler == "slurm" and not site.slurm.exclusive)
    share = prefill_share(model.workload)
    if one_node_pair and len(wishes) < 2:
        pair = place_pair(roles, shapes, share, machine, may_idle=may_idle, notes=notes)
        return pair, {"prefill": 1, "decode": 1}
    alike = None if differ(roles) else machine
    counts = share_nodes(nodes, roles, wishes, shapes, share, alike, notes)
    placed: list[ReplicaPlan] = []
    first = 0
    for role, spec in roles.items():
        pool = size_pool(
            role, spec, shapes[role], first, counts[role], machines[role], may_idle=may_idle, notes=notes
        )
        placed += place_pool(pool)
        first += counts[role]
    return placed, counts


def _room(role: Role, roles: dict[Role, RoleSpec], slots: int) -> int:
    """Slots of the one node that `role` may take when the other role is on it too."""
    other = roles["decode" if role == "prefill" else "prefill"]
    if other.tensor_parallel is None and roles[role].tensor_parallel is None:
        return slots // 2
    taken = (other.tensor_parallel or 1) * other.pipeline_parallel * other.data_parallel
    return max(1, slots - taken)


def _partner(role: Role, roles: dict[Role, RoleSpec]) -> int | None:
    return roles["decode" if role == "prefill" else "prefill"].tensor_parallel


def _slots_asked(site: Site, device: Device, slots: int, placed: list[ReplicaPlan]) -> int:
    """GPUs asked for per node: all of them, or on shared nodes the highest one that is used."""
    if device == "cpu" or site.scheduler == "local" or site.slurm.exclusive:
        return slots
    return max(max(replica.gpus) for replica in placed) + 1


def _filled(spec: RoleSpec, nodes: int, placed: list[ReplicaPlan], role: Role) -> RoleSpec:
    replicas = [replica for replica in placed if replica.role == role]
    values: dict[str, Any] = {"nodes": nodes, "replicas": len(replicas)}
    values["tensor_parallel"] = replicas[0].tensor_parallel
    return replace(spec, **values)
