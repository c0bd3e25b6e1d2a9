"""Which ports carry the GPUs' traffic, and which are for storage and management. Pure.

A rail is a port below a PCIe switch that it shares with a GPU. Machines without such switches (Grace, virtual
machines) have rails as well: there the ports of the highest rate on each NUMA node are taken for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..discovery.fabric import HcaPort
from ..discovery.gpus import Gpu
from ..discovery.pci import Relation, relation


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRails:
    """The ports one GPU uses."""

    gpu: Gpu
    ports: tuple[HcaPort, ...]
    """Nearest ones; several when equally near."""
    relation: Relation | None
    """To these ports; None where sysfs does not know the GPU."""
    lost: tuple[HcaPort, ...] = ()
    """Ports nearer to it than those it uses, or fellows of these, that can't be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRails:
    """All ports of a node, sorted out."""

    gpus: tuple[GpuRails, ...]
    ports: tuple[HcaPort, ...]
    """Rails that are active."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Every other port's name, and why."""

    def of(self, gpus: Iterable[int]) -> tuple[HcaPort, ...]:
        """The ports for these GPUs, by index; all rails where none of them is known."""
        chosen = [port for entry in self.gpus if entry.gpu.index in set(gpus) for port in entry.ports]
        return tuple(dict.fromkeys(chosen)) or self.ports


def sort_out(gpus: Iterable[Gpu], ports: Iterable[HcaPort], *, infiniband: bool) -> NodeRails:
    """Find the rails among `ports`; `infiniband` False looks for RoCE instead."""
    ports = tuple(ports)
    right = [port for port in ports if port.infiniband == infiniband]
    unusable = {port.name: _unusable(port, right) for port in right}
    usable = [port for port in right if unusable[port.name] is None]
    # A virtual adapter (rxe, siw) is a last resort: no GPU is near it.
    solid = [port for port in usable if port.pci] or usable
    placed = [gpu for gpu in gpus if gpu.pci]
    near = {(gpu.index, port.name): _relation(gpu, port) for gpu in placed for port in right if port.pci}
    switched = {name for (_, name), how in near.items() if how.on_switch}
    rails = _full_rate([port for port in solid if port.name in switched], placed, near)
    if not rails:
        rails = _fastest_by_numa(solid)
    used = [_used(gpu, rails, near) for gpu in placed]
    # A fellow that is slower than the others is one that a GPU should have, and has not.
    missing = [port for port in right if port.pci and port not in rails]
    return NodeRails(
        gpus=tuple(replace(entry, lost=_lost(entry, used, missing, near)) for entry in used),
        ports=tuple(rails),
        left_out={
            port.name: _wrong_layer(port, infiniband)
            if port not in right
            else unusable[port.name] or _spare(port, rails, switched)
            for port in ports
            if port not in rails
        },
    )


_Near = Mapping[tuple[int, str], Relation]


def _relation(gpu: Gpu, port: HcaPort) -> Relation:
    same_numa = gpu.numa is not None and gpu.numa == port.numa
    return relation(gpu.pci, port.pci, same_numa=same_numa)


def _full_rate(ports: list[HcaPort], gpus: Iterable[Gpu], near: _Near) -> list[HcaPort]:
    """Without ports that are slower than another one on the same GPU's switch."""
    kept: set[str] = set()
    for gpu in gpus:
        own = [port for port in ports if near[gpu.index, port.name].on_switch]
        best = max((port.rate_gbps for port in own), default=0.0)
        kept |= {port.name for port in own if port.rate_gbps == best}
    return [port for port in ports if port.name in kept]


def _fastest_by_numa(ports: list[HcaPort]) -> list[HcaPort]:
    """Those of the highest rate on each NUMA node, but none of less than half of what another has.

    A link that came up at half its rate is nearer than those that other GPUs use already.
    """
    best: dict[int | None, float] = {}
    for port in ports:
        best[port.numa] = max(best.get(port.numa, 0.0), port.rate_gbps)
    least = max(best.values(), default=0.0) / 2
    return [port for port in ports if port.rate_gbps == best[port.numa] >= least]


def _used(gpu: Gpu, rails: list[HcaPort], near: _Near) -> GpuRails:
    told = {port.name: near.get((gpu.index, port.name), Relation.SYS) for port in rails}
    how = min(told.values(), default=None)
    return GpuRails(gpu=gpu, ports=tuple(p for p in rails if told[p.name] == how), relation=how)


def _lost(entry: GpuRails, used: list[GpuRails], missing: list[HcaPort], near: _Near) -> tuple[HcaPort, ...]:
    """The ports that a GPU should have: nearer ones than it uses, or fellows of those.

    A second port that is cabled nowhere on the node is down by design, so fellows are missed only where
    another GPU, as near to its ports, has more of them.
    """
    how = Relation.SYS if entry.relation is None else entry.relation
    most = max((len(other.ports) for other in used if other.relation == entry.relation), default=0)
    switches = any(relation.on_switch for relation in near.values())
    found = []
    for port in missing:
        distance = near[entry.gpu.index, port.name]
        if switches and not distance.on_switch:
            continue
        if distance < how or (distance == how and len(entry.ports) < most):
            found.append(port)
    return tuple(found)


def _wrong_layer(port: HcaPort, infiniband: bool) -> str:
    wanted = "InfiniBand" if infiniband else "RoCE"
    return f"its link layer is {port.link_layer}, and the site's network is {wanted}"


def _unusable(port: HcaPort, ports: list[HcaPort]) -> str | None:
    if not port.active:
        return f"it is {port.trouble}"
    # Where none has one, /sys may just not show them.
    if not port.infiniband and port.gid_index is None and any(each.gid_index is not None for each in ports):
        return "it has no RoCE v2 GID with a routable address"
    return None


def _spare(port: HcaPort, rails: list[HcaPort], switched: set[str]) -> str:
    if not port.pci:
        return "it is a virtual device"
    if port.name not in switched and any(rail.name in switched for rail in rails):
        return "it shares a PCIe switch with no GPU, so it is there for storage or management"
    return f"it runs at {port.rate_gbps:g} Gb/s, and others at {max(rail.rate_gbps for rail in rails):g}"
