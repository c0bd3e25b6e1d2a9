"""Which pools a job has, and how many nodes each gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config.model import Role, RoleSpec
from ..errors import PlanError
from .abilities import ABILITIES
from .explain import Notes, count
from .parallel import Machine, Shape
from .ratio import Share, split_nodes
from .request import PlanRequest

PAIR: tuple[Role, Role] = ("prefill", "decode")


def choose_roles(request: PlanRequest, notes: Notes) -> dict[Role, RoleSpec]:
    """The pools of the job: `aggregated` alone, or `prefill` and `decode`."""
    model = request.model
    pair_keys = [key for key in PAIR if getattr(model, key) is not None]
    pair_flags = [f"--{key}" for key in PAIR if getattr(request, key) is not None]
    if model.aggregated is not None:
        if pair_keys or pair_flags:
            other = (pair_flags + [f"`{key}`" for key in pair_keys])[0]
            raise PlanError(
                f"`aggregated` is set in model.yaml together with {other}: "
                "a replica does both or one of the two",
                hint="remove `aggregated`, or remove `prefill`, `decode` and their flags",
            )
        notes.model("roles", "aggregated")
        return {"aggregated": model.aggregated}
    if pair_flags:
        notes.flag("roles", "prefill, decode", " ".join(pair_flags))
    elif pair_keys:
        notes.derived("roles", "prefill, decode", f"model.yaml has `{pair_keys[0]}`")
    else:
        nodes = request.nodes or model.nodes or 1
        if nodes == 1:
            reason = "one node: write `prefill: {}` in model.yaml to split its GPUs"
        elif request.site.network.kind == "slingshot" and ABILITIES[model.engine].nixl:
            reason = "NIXL's UCX can't use a Slingshot network between nodes"
        else:
            notes.derived("roles", "prefill, decode", f"{nodes} nodes are enough to have some of each")
            return {"prefill": RoleSpec(), "decode": RoleSpec()}
        notes.derived("roles", "aggregated", reason)
        return {"aggregated": RoleSpec()}
    return {"prefill": model.prefill or RoleSpec(), "decode": model.decode or RoleSpec()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Nodes somebody asked for, and how: `--prefill 3`, `prefill.nodes: 3`."""

    nodes: int
    where: str


def wished_nodes(request: PlanRequest, roles: dict[Role, RoleSpec]) -> dict[Role, Wish]:
    """Nodes asked for per pool; a flag wins over model.yaml. Pools nobody spoke of are left out."""
    wishes: dict[Role, Wish] = {}
    for role, spec in roles.items():
        flag = {"prefill": request.prefill, "decode": request.decode}.get(role)
        if flag is not None:
            wishes[role] = Wish(nodes=flag, where=f"--{role} {flag}")
        elif spec.nodes is not None:
            wishes[role] = Wish(nodes=spec.nodes, where=f"{role}.nodes {spec.nodes}")
    return wishes


def count_nodes(
    request: PlanRequest,
    roles: dict[Role, RoleSpec],
    wishes: dict[Role, Wish],
    slots: Mapping[Role, int],
    notes: Notes,
    *,
    alike: bool = True,
) -> int:
    """Nodes of the job: `--nodes`, `nodes`, the pools' own counts, or the fewest that hold the pools.

    `slots`: those of a node of each pool. Only where nodes are `alike` can pools share one.
    """
    if request.nodes is not None:
        notes.flag("nodes", request.nodes, "--nodes")
        return request.nodes
    if request.model.nodes is not None:
        notes.model("nodes", request.model.nodes)
        return request.model.nodes
    if wishes and len(wishes) == len(roles):
        nodes = sum(wish.nodes for wish in wishes.values())
        notes.derived("nodes", nodes, " + ".join(wish.where for wish in wishes.values()))
        return nodes
    if not wishes and alike and sum(map(_least_slots, roles.values())) <= min(slots.values()):
        notes.default("nodes", 1)
        return 1
    found = {**fewest(roles, wishes, slots), **wishes}
    least = {role: found[role].nodes for role in roles}
    nodes = sum(least.values())
    notes.derived(
        "nodes",
        nodes,
        "fewest nodes that hold " + " and ".join(f"{role} on {n}" for role, n in least.items()),
    )
    return nodes


def fewest(
    roles: dict[Role, RoleSpec], wishes: dict[Role, Wish], slots: Mapping[Role, int]
) -> dict[Role, Wish]:
    """For each pool nobody spoke of, the fewest nodes that hold it."""
    return {
        role: Wish(nodes=-(-_least_slots(spec) // slots[role]), where=f"the fewest nodes that hold {role}")
        for role, spec in roles.items()
        if role not in wishes
    }


def _least_slots(spec: RoleSpec) -> int:
    size = (spec.tensor_parallel or 1) * spec.pipeline_parallel * spec.data_parallel
    return size * (spec.replicas or 1)


def share_nodes(
    nodes: int,
    roles: dict[Role, RoleSpec],
    wishes: dict[Role, Wish],
    shapes: dict[Role, Shape],
    share: Share,
    machine: Machine | None,
    notes: Notes,
) -> dict[Role, int]:
    """Nodes per pool; they add up to `nodes`. `machine` is None where the pools' nodes differ."""
    if len(roles) == 1:
        (role,) = roles
        if role in wishes and wishes[role].nodes != nodes:
            raise _uneven(nodes, wishes, machine)
        return {role: nodes}
    known = dict(wishes)
    for role in PAIR:
        if role not in known and roles[role].replicas is not None and len(known) == 0:
            needed = _nodes_for(roles[role].replicas or 1, shapes[role])
            known[role] = Wish(nodes=needed, where=f"{role}.replicas {roles[role].replicas}")
    if len(known) == 2:
        if sum(wish.nodes for wish in known.values()) != nodes:
            raise _uneven(nodes, known, machine)
        counts = {role: known[role].nodes for role in PAIR}
    elif len(known) == 1:
        ((role, wish),) = known.items()
        other: Role = "decode" if role == "prefill" else "prefill"
        if wish.nodes >= nodes:
            raise PlanError(
                f"{wish.where} leaves no node for {other}: the job has {nodes}",
                hint=f"use `--nodes {wish.nodes + shapes[other].span}`, or fewer nodes for {role}",
            )
        counts = {role: wish.nodes, other: nodes - wish.nodes}
    elif machine is None:
        raise PlanError(
            f"prefill and decode are on different types of nodes, and how many of the {nodes} are of which "
            "is not said",
            hint="say it with `--prefill N --decode N`, or `nodes` of `prefill` and `decode`",
        )
    else:
        split = split_nodes(nodes, share.prefill, shapes["prefill"].span, shapes["decode"].span)
        if split is None:
            raise _no_split(nodes, shapes, machine)
        counts = {"prefill": split[0], "decode": split[1]}
        known = {}
    for role in PAIR:
        _explain_nodes(role, counts[role], known.get(role), share, notes)
    return {role: counts[role] for role in PAIR}


def _explain_nodes(role: Role, nodes: int, wish: Wish | None, share: Share, notes: Notes) -> None:
    key = f"{role}.nodes"
    if wish is None:
        notes.derived(key, nodes, share.reason)
    elif wish.where.startswith("--"):
        notes.flag(key, nodes, f"--{role}")
    elif wish.where.startswith(key):
        notes.model(key, nodes)
    else:
        notes.derived(key, nodes, wish.where)


def _nodes_for(replicas: int, shape: Shape) -> int:
    if shape.span > 1:
        return replicas * shape.span
    return -(-replicas // (shape.slots // shape.width))


def _uneven(nodes: int, wishes: dict[Role, Wish], machine: Machine | None) -> PlanError:
    total = sum(wish.nodes for wish in wishes.values())
    asked = " + ".join(wish.where for wish in wishes.values())
    if nodes == 1 and len(wishes) == 2:
        return PlanError(
            f"{asked} is {total} nodes, but the job has 1",
            hint="leave both out: one node holds prefill and decode on different GPUs; "
            f"or use `--nodes {total}`",
        )
    if total < nodes:
        idle = nodes - total
        slots = f" ({count(idle * machine.slots, machine.unit)})" if machine else ""
        waste = f": {count(idle, 'node')}{slots} would idle"
    else:
        waste = ""
    last = list(wishes)[-1]
    fixed = wishes[last].nodes + nodes - total
    flag = f"--{last}" if last != "aggregated" else "aggregated.nodes"
    alternative = f", or {flag} {fixed}" if fixed > 0 else ""
    return PlanError(
        f"{asked} is {count(total, 'node')}, but the job has {nodes}{waste}",
        hint=f"use `--nodes {total}`{alternative}",
    )


def _no_split(nodes: int, shapes: dict[Role, Shape], machine: Machine) -> PlanError:
    prefill, decode = shapes["prefill"].span, shapes["decode"].span
    least = prefill + decode
    if nodes < least:
        return PlanError(
            f"a prefill replica takes {count(prefill, 'node')} and a decode replica {count(decode, 'node')}, "
            f"but the job has {nodes}",
            hint=f"use `--nodes {least}` or more, or an `aggregated:` pool",
        )
    fewer = next(n for n in range(nodes - 1, 0, -1) if split_nodes(n, 0.5, prefill, decode))
    more = next(
        n for n in range(nodes + 1, nodes + prefill * decode + 1) if split_nodes(n, 0.5, prefill, decode)
    )
    idle = nodes - fewer
    return PlanError(
        f"{nodes} nodes don't divide into prefill replicas of {count(prefill, 'node')} "
        f"and decode replicas of {count(decode, 'node')}: {count(idle, 'node')} "
        f"({count(idle * machine.slots, machine.unit)}) would idle",
        hint=f"use `--nodes {fewer}` or `--nodes {more}`",
    )
