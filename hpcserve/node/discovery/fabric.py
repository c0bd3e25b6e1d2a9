"""InfiniBand and RoCE ports of this node, read from sysfs: no list of device names anywhere.

A port counts when its state is ACTIVE; whether it is InfiniBand or Ethernet is what the kernel says
(`link_layer`). Format: Linux Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from .pci import SYSFS, children, numa_node, resolved, text


@dataclass(frozen=True, slots=True, kw_only=True)
class HcaPort:
    """One port of a host channel adapter."""

    hca: str
    port: int
    link_layer: str
    """`InfiniBand` or `Ethernet` (RoCE)."""
    state: str
    """`ACTIVE`, `DOWN`, `INIT`, …"""
    phys_state: str = ""
    """`LinkUp`, `Polling`, `Disabled`, …: why a port is down."""
    rate_gbps: float
    numa: int | None
    pci: str
    """Resolved sysfs path of the PCI device; empty for a virtual device."""
    gid_index: int | None = None
    """Of an Ethernet port, the entry of its GID table that is RoCE v2 with an address other subnets reach."""

    @property
    def name(self) -> str:
        """As UCX_NET_DEVICES wants it: `mlx5_0:1`."""
        return f"{self.hca}:{self.port}"

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def infiniband(self) -> bool:
        return self.link_layer == "InfiniBand"

    @property
    def trouble(self) -> str:
        """Its state for people: `DOWN (Polling)`."""
        return (self.state or "unknown") + (f" ({self.phys_state})" if self.phys_state else "")


def hca_ports(sysfs: Path = SYSFS) -> tuple[HcaPort, ...]:
    """All ports of all adapters, active or not, sorted by name."""
    found: list[HcaPort] = []
    for device in children(sysfs / "class" / "infiniband"):
        pci = device / "device"
        for port in children(device / "ports"):
            if not port.name.isdecimal():
                continue
            layer = text(port / "link_layer") or "InfiniBand"
            found.append(
                HcaPort(
                    hca=device.name,
                    port=int(port.name),
                    link_layer=layer,
                    # The files read `4: ACTIVE`, `5: LinkUp` and `400 Gb/sec (4X NDR)`.
                    state=text(port / "state").partition(":")[2].strip(),
                    phys_state=text(port / "phys_state").partition(":")[2].strip(),
                    rate_gbps=_rate(text(port / "rate")),
                    numa=numa_node(pci),
                    pci=resolved(pci),
                    gid_index=None if layer == "InfiniBand" else routable_gid(port),
                )
            )
    return tuple(sorted(found, key=lambda port: (_natural(port.hca), port.port)))


def routable_gid(port: Path) -> int | None:
    """Index of a port's RoCE v2 GID with an IPv4 address, or else with a global IPv6 address.

    Link-local GIDs and those of RoCE v1 do not get past a router.
    """
    found: dict[int, ipaddress.IPv6Address] = {}
    for entry in children(port / "gids"):
        if not entry.name.isdecimal() or text(port / "gid_attrs" / "types" / entry.name) != "RoCE v2":
            # The kernel has no type for an empty entry, and answers EINVAL.
            continue
        try:
            gid = ipaddress.IPv6Address(text(entry))
        except ValueError:
            continue
        if not (gid.is_unspecified or gid.is_link_local or (gid.ipv4_mapped or gid).is_link_local):
            found[int(entry.name)] = gid
    return min(found, key=lambda index: (found[index].ipv4_mapped is None, index), default=None)


def _rate(told: str) -> float:
    number = told.split(" ")[0]
    try:
        return float(number)
    except ValueError:
        return 0.0


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)
