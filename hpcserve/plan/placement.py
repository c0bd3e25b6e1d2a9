"""Puts replicas on nodes and GPUs: nodes in rank order, each filled from GPU 0."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.model import Role, RoleSpec
from ..errors import PlanError
from .explain import Notes, count
from .parallel import Machine, Shape
from .plan import ReplicaPlan
from .ratio import Share, split_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All replicas of one role, on nodes of their own."""

    role: Role
    shape: Shape
    replicas: int
    first_node: int
    nodes: int


def size_pool(
    role: Role,
    spec: RoleSpec,
    shape: Shape,
    first_node: int,
    nodes: int,
    machine: Machine,
    *,
    may_idle: bool,
    notes: Notes,
) -> Pool:
    """How many replicas a pool of whole nodes gets. `may_idle`: unused GPUs are not asked for."""
    key = f"{role}.replicas"
    per_node = machine.slots // shape.width
    capacity = nodes // shape.span if shape.span > 1 else nodes * per_node
    if shape.span > 1 and nodes % shape.span:
        idle = nodes % shape.span
        raise PlanError(
            f"{role} has {nodes} nodes, but a replica of {shape.formula()} takes {shape.span}: "
            f"{count(idle, 'node')} ({count(idle * machine.slots, machine.unit)}) would idle",
            hint=f"use {nodes - idle or shape.span} or {nodes - idle + shape.span} nodes for {role}",
        )
    if spec.replicas is not None:
        replicas = spec.replicas
        notes.model(key, replicas)
    elif machine.device == "cpu":
        replicas = nodes // shape.span
        notes.derived(key, replicas, f"one engine per {_place(shape)} on device cpu; `{key}` asks for more")
    else:
        replicas = capacity
        notes.derived(key, replicas, f"fills {count(nodes, 'node')} of {count(machine.slots, 'GPU')}")
    _check_pool(role, shape, replicas, capacity, nodes, machine, may_idle=may_idle)
    return Pool(role=role, shape=shape, replicas=replicas, first_node=first_node, nodes=nodes)


def _place(shape: Shape) -> str:
    return "node" if shape.span == 1 else f"{shape.span} nodes"


def _check_pool(
    role: Role, shape: Shape, replicas: int, capacity: int, nodes: int, machine: Machine, *, may_idle: bool
) -> None:
    room = f"{count(nodes, 'node')} of {count(machine.slots, machine.unit)}"
    if replicas > capacity:
        raise PlanError(
            f"{role}.replicas is {replicas}, but there is room for {capacity} of {shape.formula()} on {room}",
            hint=f"set `{role}.replicas` to {capacity}, or give {role} more nodes",
        )
    idle_nodes = nodes - min(nodes, replicas * shape.span)
    if idle_nodes:
        raise PlanError(
            f"{role}.replicas is {replicas}, but {role} has {count(nodes, 'node')}: "
            f"{count(idle_nodes, 'node')} ({count(idle_nodes * machine.slots, machine.unit)}) would idle",
            hint=f"set `{role}.replicas` to {capacity}, or give {role} {count(nodes - idle_nodes, 'node')}",
        )
    idle = nodes * machine.slots - replicas * shape.width
    if not idle or may_idle:
        return
    leftover = machine.slots % shape.width if shape.span == 1 else 0
    if leftover:
        sizes = [str(size) for size in range(1, machine.slots + 1) if machine.slots % size == 0]
        raise PlanError(
            f"{role}: replicas of {shape.formula()} leave over {leftover} of the {machine.slots} GPUs "
            f"of a node: {idle} GPUs would idle",
            hint=f"make the GPUs of one {role} replica one of {', '.join(sizes)}",
        )
    raise PlanError(
        f"{role}.replicas is {replicas}, but there is room for {capacity} on {room}: {idle} GPUs would idle",
        hint=f"set `{role}.replicas` to {capacity}, or leave it out",
    )


def place_pool(pool: Pool) -> list[ReplicaPlan]:
    """Replicas of one pool; over few enough of them, evenly on its nodes."""
    shape, placed = pool.shape, []
    filled = [0] * pool.nodes
    for index in range(pool.replicas):
        if shape.span > 1:
            first = pool.first_node + index * shape.span
            nodes = tuple(range(first, first + shape.span))
            gpus = tuple(range(shape.slots))
        else:
            node = index * pool.nodes // pool.replicas
            nodes = (pool.first_node + node,)
            gpus = tuple(range(filled[node], filled[node] + shape.width))
            filled[node] += shape.width
        placed.append(_replica(pool.role, index, nodes, gpus, shape))
    return placed


def place_pair(
    roles: dict[Role, RoleSpec],
    shapes: dict[Role, Shape],
    share: Share,
    machine: Machine,
    *,
    may_idle: bool,
    notes: Notes,
) -> list[ReplicaPlan]:
    """Prefill and decode on different GPUs of the one node of the job."""
    prefill, decode = shapes["prefill"], shapes["decode"]
    counts = _pair_counts(roles, prefill, decode, share, machine, notes)
    used = counts[0] * prefill.width + counts[1] * decode.width
    idle = machine.slots - used
    both = (
        f"{count(counts[0], 'prefill replica')} of {prefill.width} and "
        f"{count(counts[1], 'decode replica')} of {decode.width}"
    )
    if idle < 0:
        raise PlanError(
            f"{both} {machine.unit}s need {used}, but one node has {machine.slots}",
            hint="lower `replicas` or `tensor_parallel`, or use `--nodes 2`",
        )
    if idle and not may_idle:
        raise PlanError(
            f"{both} GPUs use {used} of the {machine.slots} of the node: {idle} would idle",
            hint="choose `replicas` and `tensor_parallel` of `prefill` and `decode` so that they add up to "
            f"{machine.slots}",
        )
    placed, slot = [], 0
    for role, shape, number in (("prefill", prefill, counts[0]), ("decode", decode, counts[1])):
        for index in range(number):
            placed.append(_replica(role, index, (0,), tuple(range(slot, slot + shape.width)), shape))  # type: ignore[arg-type]
            slot += shape.width
    return placed


def _pair_counts(
    roles: dict[Role, RoleSpec], prefill: Shape, decode: Shape, share: Share, machine: Machine, notes: Notes
) -> tuple[int, int]:
    asked = roles["prefill"].replicas, roles["decode"].replicas
    if machine.device == "cpu":
        counts, reason = (asked[0] or 1, asked[1] or 1), "one engine of each role on device cpu"
    elif asked[0] is not None and asked[1] is not None:
        counts, reason = (asked[0], asked[1]), ""
    elif asked[0] is not None:
        counts = asked[0], max(1, (machine.slots - asked[0] * prefill.width) // decode.width)
        reason = "fills the GPUs that prefill leaves"
    elif asked[1] is not None:
        counts = max(1, (machine.slots - asked[1] * decode.width) // prefill.width), asked[1]
        reason = "fills the GPUs that decode leaves"
    else:
        counts = split_slots(machine.slots, share.prefill, prefill.width, decode.width) or (1, 1)
        reason = share.reason
    for role, given, number in (("prefill", asked[0], counts[0]), ("decode", asked[1], counts[1])):
        if given is None:
            notes.derived(f"{role}.replicas", number, reason)
        else:
            notes.model(f"{role}.replicas", number)
    return counts


def _replica(
    role: Role, index: int, nodes: tuple[int, ...], gpus: tuple[int, ...], shape: Shape
) -> ReplicaPlan:
    return ReplicaPlan(
        name=f"{role}-{index}",
        role=role,
        nodes=nodes,
        gpus=gpus,
        tensor_parallel=shape.tensor,
        pipeline_parallel=shape.pipeline,
        data_parallel=shape.data,
        expert_parallel=shape.expert,
    )
