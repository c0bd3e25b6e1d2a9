"""Where PCI devices are: their place in sysfs, their NUMA node, and how far apart two of them are."""

from __future__ import annotations

import os
import re
from enum import IntEnum
from pathlib import Path

SYSFS = Path("/sys")
_ROOT = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")


class Relation(IntEnum):
    """What traffic between two devices crosses, nearest first; named as in `nvidia-smi topo -m`."""

    PIX = 0
    """One PCIe switch at most."""
    PXB = 1
    """Several PCIe bridges, and no host bridge."""
    PHB = 2
    """A host bridge."""
    NODE = 3
    """Host bridges of one NUMA node."""
    SYS = 4
    """The link between NUMA nodes; also what nothing is known about."""

    @property
    def on_switch(self) -> bool:
        """Below a PCIe switch that both devices share."""
        return self <= Relation.PXB


def relation(one: str, other: str, *, same_numa: bool) -> Relation:
    """How two devices are joined, from their resolved sysfs paths; "" for a device without one."""
    first, second = _below_host(one), _below_host(other)
    if not first or not second or first[0] != second[0]:
        return Relation.NODE if same_numa else Relation.SYS
    shared = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        shared += 1
    if shared == 1:
        return Relation.PHB
    # Below one switch, each is at most its own downstream port away from it.
    return Relation.PIX if max(len(first), len(second)) - shared <= 2 else Relation.PXB


def _below_host(path: str) -> tuple[str, ...]:
    """`pciDDDD:BB` of the host bridge, then bridge by bridge down to the device."""
    parts = Path(path).parts
    for index, part in enumerate(parts):
        if _ROOT.fullmatch(part):
            return parts[index:]
    return ()


def numa_node(device: Path) -> int | None:
    """NUMA node of a PCI device; None when the machine has none."""
    found = text(device / "numa_node")
    return int(found) if found and not found.startswith("-") else None


def pci_device(bdf: str, sysfs: Path = SYSFS) -> Path:
    """sysfs directory of a PCI address as nvidia-smi prints it (`00000000:1B:00.0`)."""
    domain, _, rest = bdf.lower().partition(":")
    return sysfs / "bus" / "pci" / "devices" / f"{domain[-4:].zfill(4)}:{rest}"


def resolved(device: Path) -> str:
    """The device's place in the tree; "" when it is not there."""
    return os.path.realpath(device) if device.exists() else ""


def children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def text(path: Path) -> str:
    """What a sysfs file says; "" when it can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        # A port that is being reset answers EINVAL: it is not usable now, and reads as such.
        return ""
