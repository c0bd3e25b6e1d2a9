"""Which network devices an engine's KV transfers and collectives use, from what the nodes found. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...plan.plan import Plan, ReplicaPlan
from ..discovery.fabric import HcaPort
from ..discovery.facts import RankFacts
from ..fabric import nvlink
from ..fabric.rails import NodeRails, sort_out
from ..fabric.settings import Degraded, Setting

_RDMA = ("infiniband", "roce")
_ON = {
    "UCX_CUDA_IPC_ENABLE_MNNVL": ("y", "yes", "1", "on", "try"),
    "NCCL_MNNVL_ENABLE": ("1", "2"),
    "NCCL_CUMEM_ENABLE": ("1",),
}
"""What a site may write for them, if memory is to be shared over NVLink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    settings: tuple[Setting, ...] = ()
    degraded: tuple[Degraded, ...] = ()
    kv_over_nvlink: bool = False
    """KV blocks cross NVLink to other nodes: they must lie in memory that can be shared so."""

    @property
    def env(self) -> Mapping[str, str]:
        return {setting.name: setting.value for setting in self.settings}


def transfer_devices(
    plan: Plan, facts: RankFacts, replica: ReplicaPlan, ranks: Sequence[RankFacts]
) -> Devices:
    """UCX, NCCL and Gloo variables for one replica's process on one node, and what is wrong with them.

    `ranks` are all nodes of the job: whether NVLink joins two of them is seen only from both.
    """
    joined = tuple(nvlink.settings(plan, facts, replica, ranks))
    settings = (*_sockets(facts), *_transports(plan, facts, replica), *joined)
    final = {setting.name: setting.value for setting in settings} | given(plan, replica)
    over_nvlink = {setting.name for setting in joined if final[setting.name] in _ON[setting.name]}
    all_over_nvlink = bool(joined) and len(over_nvlink) == len(joined)
    degraded = _degraded(plan, facts, replica, ranks, all_over_nvlink) if crosses_nodes(plan, replica) else ()
    return Devices(
        settings=settings,
        degraded=tuple(degraded),
        kv_over_nvlink="UCX_CUDA_IPC_ENABLE_MNNVL" in over_nvlink,
    )


def given(plan: Plan, replica: ReplicaPlan) -> dict[str, str]:
    """The variables that site and model.yaml set: they are above the ones that are derived."""
    pool = getattr(plan.model, replica.role)
    return {**plan.site.network.env, **plan.model.env, **(pool.env if pool is not None else {})}


def crosses_nodes(plan: Plan, replica: ReplicaPlan) -> bool:
    """Does anything of this replica's go to another node: KV blocks, or its own collectives?"""
    return len({*replica.nodes, *nvlink.kv_partners(plan, replica)}) > 1


def rails_of(plan: Plan, facts: RankFacts) -> NodeRails:
    """The node's ports, sorted out for the site's kind of network."""
    return sort_out(facts.gpus, facts.hcas, infiniband=plan.site.network.kind != "roce")


def degraded_anywhere(plan: Plan, ranks: Sequence[RankFacts]) -> tuple[Degraded, ...]:
    """What is degraded on any node, each once: nodes with the same trouble are named together."""
    found: dict[tuple[str, str], list[str]] = {}
    for facts in ranks:
        for replica in plan.on_node(facts.rank):
            for entry in transfer_devices(plan, facts, replica, ranks).degraded:
                nodes = found.setdefault((entry.message, entry.hint), [])
                if facts.node not in nodes:
                    nodes.append(facts.node)
    return tuple(
        Degraded(message=f"{message} ({', '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''})", hint=hint)
        for (message, hint), nodes in found.items()
    )


# The variables.


def _sockets(facts: RankFacts) -> Iterator[Setting]:
    if facts.interface is None:
        return
    why = f"the interface of {facts.address}, where the other nodes reach this one"
    yield Setting(name="NCCL_SOCKET_IFNAME", value=f"={facts.interface}", why=why)
    yield Setting(name="GLOO_SOCKET_IFNAME", value=facts.interface, why=why)


def _transports(plan: Plan, facts: RankFacts, replica: ReplicaPlan) -> Iterator[Setting]:
    kind = plan.site.network.kind
    ports = rails_of(plan, facts).of(replica.gpus) if kind in _RDMA else ()
    if not ports:
        yield from _tcp(plan, facts, replica)
        return
    names = ",".join(port.name for port in ports)
    why = _why(plan, facts, replica, ports)
    yield Setting(name="UCX_NET_DEVICES", value=names, why=why)
    # `=` asks NCCL for these names; without it mlx5_1 would also mean mlx5_10.
    yield Setting(name="NCCL_IB_HCA", value=f"={names}", why=why)
    gids = {port.gid_index for port in ports}
    if kind == "roce" and len(gids) == 1 and None not in gids:
        # Where they differ, UCX and NCCL must choose for each device: one number is for all.
        index, why = str(gids.pop()), "the RoCE v2 entry with a routable address in these ports' GID tables"
        yield Setting(name="UCX_IB_GID_INDEX", value=index, why=why)
        yield Setting(name="NCCL_IB_GID_INDEX", value=index, why=why)


def _why(plan: Plan, facts: RankFacts, replica: ReplicaPlan, ports: Iterable[HcaPort]) -> str:
    near = [entry for entry in rails_of(plan, facts).gpus if entry.gpu.index in replica.gpus]
    if not near:
        return "the active ports of the highest rate; sysfs does not tell which are near the GPUs"
    told = (
        f"GPU {entry.gpu.index} {entry.relation.name if entry.relation is not None else '?'} "
        + ",".join(port.name for port in entry.ports)
        for entry in near
    )
    return f"active ports nearest to its GPUs by PCIe: {'; '.join(told)}"


def _tcp(plan: Plan, facts: RankFacts, replica: ReplicaPlan) -> Iterator[Setting]:
    kind = plan.site.network.kind
    transports = ["tcp", "self"]
    if kind == "loopback":
        transports.append("sm")
    if plan.device == "cuda":
        transports += ["cuda_copy", "cuda_ipc"]
    why = f"no active {kind} port" if kind in _RDMA else f"UCX has only TCP for a network of kind {kind}"
    yield Setting(name="UCX_TLS", value=",".join(transports), why=why)
    if facts.interface is not None:
        why = f"the interface of {facts.address}, where the other nodes reach this one"
        yield Setting(name="UCX_NET_DEVICES", value=facts.interface, why=why)


# What is worse than it should be.


def _degraded(
    plan: Plan, facts: RankFacts, replica: ReplicaPlan, ranks: Sequence[RankFacts], all_over_nvlink: bool
) -> Iterator[Degraded]:
    complaint = nvlink.complaint(plan, facts, replica, ranks)
    # Who sets it has decided.
    if complaint is not None and "UCX_CUDA_IPC_ENABLE_MNNVL" not in given(plan, replica):
        yield Degraded(
            message=complaint,
            hint="`nvidia-smi -q` (Fabric), `nvidia-imex-ctl -N` and /dev/nvidia-caps-imex-channels, in the"
            " step and the container, show it; `slurm.segment` of the site keeps a job inside one block",
        )
    if all_over_nvlink:
        # What follows is about the way that is then not taken.
        return
    yield from _degraded_network(plan, facts, replica)


def _degraded_network(plan: Plan, facts: RankFacts, replica: ReplicaPlan) -> Iterator[Degraded]:
    kind = plan.site.network.kind
    what = "collectives cross" if replica.role == "aggregated" else "KV blocks cross"
    if kind in _RDMA:
        rails = rails_of(plan, facts)
        if rails.ports:
            yield from _weak_rails(plan, facts, replica, rails)
        else:
            yield _no_port(plan, facts, rails, what)
    elif kind == "slingshot":
        yield Degraded(
            message=f"{what} Slingshot as TCP: UCX and NCCL's own code have no transport for its adapters",
            hint="for NCCL, load the site's aws-ofi-nccl plugin and set `NCCL_NET: AWS Libfabric` in"
            " `network.env` of the site; for KV blocks, use `aggregated` replicas",
        )
    else:
        yield Degraded(
            message=f"{what} {'the loopback' if kind == 'loopback' else 'Ethernet'} as TCP",
            hint="right for tests and small models; for speed the nodes need InfiniBand or RoCE"
            " (`network.kind` of the site)",
        )


def _no_port(plan: Plan, facts: RankFacts, rails: NodeRails, what: str) -> Degraded:
    seen = "; ".join(f"{name}: {why}" for name, why in rails.left_out.items())
    seen = seen or "no adapter in /sys/class/infiniband"
    if facts.cxis:
        seen += f"; but Slingshot adapters {', '.join(device.name for device in facts.cxis)}"
    return Degraded(
        message=f"no active {plan.site.network.kind} port, so {what} TCP: {seen}",
        hint="in a container, is /sys mounted and /dev/infiniband bound? Otherwise report the node",
    )


def _weak_rails(plan: Plan, facts: RankFacts, replica: ReplicaPlan, rails: NodeRails) -> Iterator[Degraded]:
    best = max(port.rate_gbps for port in rails.ports)
    for entry in rails.gpus:
        if entry.gpu.index not in replica.gpus:
            continue
        used = ", ".join(port.name for port in entry.ports)
        for port in entry.lost:
            yield Degraded(
                message=f"GPU {entry.gpu.index} goes without {port.name}, and uses {used}:"
                f" {rails.left_out[port.name]}",
                hint="report the node; the run goes on with what there is",
            )
        for port in entry.ports:
            if port.rate_gbps < best:
                yield Degraded(
                    message=f"{port.name} of GPU {entry.gpu.index} runs at {port.rate_gbps:g} Gb/s,"
                    f" others at {best:g}",
                    hint="a cable or a switch port may be bad: report the node",
                )
    ports = rails.of(replica.gpus)
    if plan.site.network.kind == "roce" and any(port.gid_index is None for port in ports):
        without = ", ".join(port.name for port in ports if port.gid_index is None)
        yield Degraded(
            message=f"{without} has no RoCE v2 GID with a routable address",
            hint="has its network interface an IP address? In a container, is /sys mounted?",
        )
