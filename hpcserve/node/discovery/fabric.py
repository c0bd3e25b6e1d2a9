"""InfiniBand, RoCE and GPUs of this node, read from sysfs: no list of device names anywhere.

A port counts when its state is ACTIVE; whether it is InfiniBand or Ethernet is what the kernel says
(`link_layer`). Which ports serve a GPU follows from the PCIe tree. Format: Linux
Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")


@dataclass(frozen=True, slots=True, kw_only=True)
class HcaPort:
    """One port of a host channel adapter."""

    hca: str
    port: int
    link_layer: str
    """`InfiniBand` or `Ethernet` (RoCE)."""
    state: str
    """`ACTIVE`, `DOWN`, `INIT`, …"""
    rate_gbps: float
    numa: int | None
    pci: str
    """Resolved sysfs path of the PCI device; empty for a virtual device."""

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


def hca_ports(sysfs: Path = SYSFS) -> tuple[HcaPort, ...]:
    """All ports of all adapters, active or not, sorted by name."""
    root = sysfs / "class" / "infiniband"
    found: list[HcaPort] = []
    for device in _children(root):
        pci = device / "device"
        path = os.path.realpath(pci) if pci.exists() else ""
        for port in _children(device / "ports"):
            if not port.name.isdecimal():
                continue
            found.append(
                HcaPort(
                    hca=device.name,
                    port=int(port.name),
                    link_layer=_text(port / "link_layer") or "InfiniBand",
                    # The files read `4: ACTIVE` and `400 Gb/sec (4X NDR)`.
                    state=_text(port / "state").partition(":")[2].strip(),
                    rate_gbps=_rate(_text(port / "rate")),
                    numa=numa_node(pci),
                    pci=path,
                )
            )
    return tuple(sorted(found, key=lambda port: (_natural(port.hca), port.port)))


def numa_node(device: Path) -> int | None:
    """NUMA node of a PCI device; None when the machine has none."""
    text = _text(device / "numa_node")
    return int(text) if text and not text.startswith("-") else None


def pci_device(bdf: str, sysfs: Path = SYSFS) -> Path:
    """sysfs directory of a PCI address as nvidia-smi prints it (`00000000:1B:00.0`)."""
    domain, _, rest = bdf.lower().partition(":")
    return sysfs / "bus" / "pci" / "devices" / f"{domain[-4:].zfill(4)}:{rest}"


def distance(one: str, other: str) -> tuple[int, int]:
    """How far apart two PCI devices are: (different root complexes, bridges on the way)."""
    first, second = Path(one).parts, Path(other).parts
    shared = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        shared += 1
    same_root = any(part.startswith("pci") for part in first[:shared])
    return (0 if same_root else 1, len(first) + len(second) - 2 * shared)


def nearest(gpu: Path, ports: Iterable[HcaPort]) -> tuple[HcaPort, ...]:
    """The ports that share most of the PCIe tree with a GPU; several when equally near.

    Across root complexes the NUMA node decides first: bridges say nothing there.
    """
    path = os.path.realpath(gpu)
    numa = numa_node(gpu)

    def far(port: HcaPort) -> tuple[int, int, int]:
        roots, bridges = distance(path, port.pci)
        if roots == 0:
            return (0, 0, bridges)
        return (1, 0 if numa is not None and numa == port.numa else 1, 0)

    near = [port for port in ports if port.pci]
    best = min((far(port) for port in near), default=None)
    return tuple(port for port in near if far(port) == best)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        # A port that is being reset answers EINVAL: it is not usable now, and reads as such.
        return ""


def _rate(text: str) -> float:
    number = text.split(" ")[0]
    try:
        return float(number)
    except ValueError:
        return 0.0


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)
