"""The plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..config.model import ROLES, Role
from ..plan.explain import count, duration
from ..plan.plan import Plan, ReplicaPlan


def layout_line(plan: Plan) -> str:
    """`8 nodes, 5 prefill + 3 decode replicas of tensor_parallel 8, vllm`."""
    pools = []
    for role in ROLES:
        replicas = plan.with_role(role)
        if replicas:
            where = f" on {type_of(plan, replicas[0])}" if plan.components else ""
            pools.append(f"{len(replicas)} {role} ({parallel_sizes(replicas[0])}){where}")
    return f"{count(plan.nodes, 'node')}, {' + '.join(pools)}, {plan.model.engine} on {plan.device}"


def type_of(plan: Plan, replica: ReplicaPlan) -> str:
    """The type of the replica's nodes, by the site's name for it; `default` for its `node`."""
    first = 0
    for part in plan.parts:
        first += part.nodes
        if replica.nodes[0] < first:
            break
    return part.node_type or "default"


def parallel_sizes(replica: ReplicaPlan) -> str:
    """`TP8`, `TP4 PP2`, `TP8 DP2 EP`."""
    parts = [f"TP{replica.tensor_parallel}"]
    if replica.pipeline_parallel > 1:
        parts.append(f"PP{replica.pipeline_parallel}")
    if replica.data_parallel > 1:
        parts.append(f"DP{replica.data_parallel}")
    if replica.expert_parallel:
        parts.append("EP")
    return " ".join(parts)


def cost_line(plan: Plan) -> str:
    """What the job is charged at most."""
    if not plan.gpus:
        return f"{count(plan.nodes, 'node')} × {duration(plan.walltime)}, no GPUs"
    sizes = " + ".join(
        f"{count(part.nodes, 'node')} × {count(part.slots_per_node, 'GPU')}" for part in plan.parts
    )
    sizes = f"({sizes})" if plan.components else sizes
    text = f"{sizes} × {duration(plan.walltime)} = {plan.gpu_hours:,.1f} GPU-hours at most"
    rate = plan.site.gpu_hour_rate
    return f"{text}, {plan.gpu_hours * rate:,.1f} units at {rate:g} each" if rate else text


def plan_table(plan: Plan) -> str:
    """Several lines: what, where, and what it costs."""
    head = [
        ("model", f"{plan.model.model} as {plan.served_name}"),
        ("engine", f"{plan.model.engine} on {plan.device}"),
        ("site", plan.site.name),
        ("walltime", duration(plan.walltime)),
        ("cost", cost_line(plan)),
    ]
    lines = [f"{key:<9} {value}" for key, value in head]
    header = ("NODES", *(("TYPE",) if plan.components else ()), "ROLE", "REPLICAS", "EACH", "GPUS")
    return "\n".join([*lines, "", *columns(header, _rows(plan))])


def _rows(plan: Plan) -> Iterator[Sequence[str]]:
    for role in ROLES:
        replicas = plan.with_role(role)
        if not replicas:
            continue
        ranks = sorted({rank for replica in replicas for rank in replica.nodes})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        kind = (type_of(plan, replicas[0]),) if plan.components else ()
        yield span, *kind, role, str(len(replicas)), _each(replicas[0]), _gpus(plan, role)


def _each(replica: ReplicaPlan) -> str:
    sizes = parallel_sizes(replica)
    return f"{sizes} over {len(replica.nodes)} nodes" if len(replica.nodes) > 1 else sizes


def _gpus(plan: Plan, role: Role) -> str:
    if plan.device == "cpu":
        return "-"
    return str(sum(len(replica.gpus) * len(replica.nodes) for replica in plan.with_role(role)))


def columns(header: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    """Left-aligned text columns."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
