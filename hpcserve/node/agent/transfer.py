"""Which network devices an engine's KV transfers and collectives use, from what the node found. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...plan.plan import Plan, ReplicaPlan
from ..discovery.facts import RankFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """One thing that is worse than the site promises."""

    message: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    env: Mapping[str, str] = field(default_factory=dict)
    degraded: tuple[Degraded, ...] = ()


def transfer_devices(plan: Plan, facts: RankFacts, replica: ReplicaPlan) -> Devices:
    """UCX, NCCL and Gloo variables for one replica's process on one node, and what is wrong with them."""
    kind = plan.site.network.kind
    sockets = _sockets(facts)
    if kind in ("infiniband", "roce"):
        ports = _ports(plan, facts, replica)
        if ports:
            env = {
                **sockets,
                "UCX_NET_DEVICES": ",".join(ports),
                # `=` asks NCCL for these names; without it mlx5_1 would also mean mlx5_10.
                "NCCL_IB_HCA": "=" + ",".join(ports),
            }
            return Devices(env=env)
        return Devices(env={**sockets, **_tcp(plan, facts)}, degraded=(_no_port(plan, facts),))
    if kind == "slingshot":
        return Devices(
            env={**sockets, **_tcp(plan, facts)},
            degraded=(
                Degraded(
                    message="KV blocks cross Slingshot as TCP: UCX has no transport for its adapters",
                    hint="expect a fraction of the link's rate, or use `aggregated` replicas",
                ),
            ),
        )
    slow = Degraded(
        message=f"KV blocks cross {'the loopback' if kind == 'loopback' else 'Ethernet'} as TCP",
        hint="right for tests and small models; for speed the nodes need InfiniBand or RoCE"
        " (`network.kind` of the site)",
    )
    return Devices(env={**sockets, **_tcp(plan, facts)}, degraded=(slow,))


def degraded_anywhere(plan: Plan, ranks: Iterable[RankFacts]) -> tuple[Degraded, ...]:
    """What is degraded on any node, each once: nodes with the same trouble are named together."""
    if not plan.disaggregated:
        return ()
    found: dict[tuple[str, str], list[str]] = {}
    for facts in ranks:
        for replica in plan.on_node(facts.rank):
            for entry in transfer_devices(plan, facts, replica).degraded:
                nodes = found.setdefault((entry.message, entry.hint), [])
                if facts.node not in nodes:
                    nodes.append(facts.node)
    return tuple(
        Degraded(message=f"{message} ({', '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''})", hint=hint)
        for (message, hint), nodes in found.items()
    )


def _ports(plan: Plan, facts: RankFacts, replica: ReplicaPlan) -> list[str]:
    """Active ports nearest to the replica's GPUs; all active ones when the PCIe tree does not tell."""
    wanted = plan.site.network.kind == "infiniband"
    active = [port.name for port in facts.hcas if port.active and port.infiniband == wanted]
    near = [name for gpu in facts.gpus if gpu.index in replica.gpus for name in gpu.hcas if name in active]
    return list(dict.fromkeys(near)) or active


def _sockets(facts: RankFacts) -> dict[str, str]:
    if facts.interface is None:
        return {}
    return {"NCCL_SOCKET_IFNAME": f"={facts.interface}", "GLOO_SOCKET_IFNAME": facts.interface}


def _tcp(plan: Plan, facts: RankFacts) -> dict[str, str]:
    transports = ["tcp", "self"]
    if plan.site.network.kind == "loopback":
        transports.append("sm")
    if plan.device == "cuda":
        transports += ["cuda_copy", "cuda_ipc"]
    env = {"UCX_TLS": ",".join(transports)}
    if facts.interface is not None:
        env["UCX_NET_DEVICES"] = facts.interface
    return env


def _no_port(plan: Plan, facts: RankFacts) -> Degraded:
    down = [f"{port.name} is {port.state or 'unknown'}" for port in facts.hcas if not port.active]
    other = [f"{port.name} is {port.link_layer}" for port in facts.hcas if port.active]
    seen = "; ".join(down + other) or "no adapter in /sys/class/infiniband"
    return Degraded(
        message=f"no active {plan.site.network.kind} port, so KV blocks cross TCP: {seen}",
        hint="in a container, is /sys mounted and /dev/infiniband bound? Otherwise report the node",
    )
