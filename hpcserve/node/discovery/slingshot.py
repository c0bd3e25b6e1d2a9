"""Slingshot adapters of this node (HPE Cassini), which the kernel lists apart from InfiniBand's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .pci import SYSFS, children, numa_node, resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class CxiDevice:
    """One adapter, as libfabric's `cxi` provider names it."""

    name: str
    interface: str | None = None
    """Its network interface, `hsn0`, …; None where it has none."""
    numa: int | None = None
    pci: str = ""


def cxi_devices(sysfs: Path = SYSFS) -> tuple[CxiDevice, ...]:
    """All adapters, sorted by name. Drivers of before 2024 list them under cxi_user only."""
    names = children(sysfs / "class" / "cxi") or children(sysfs / "class" / "cxi_user")
    found = []
    for entry in names:
        device = entry / "device"
        interfaces = [interface.name for interface in children(device / "net")]
        found.append(
            CxiDevice(
                name=entry.name,
                interface=interfaces[0] if interfaces else None,
                numa=numa_node(device),
                pci=resolved(device),
            )
        )
    return tuple(sorted(found, key=lambda device: device.name))
