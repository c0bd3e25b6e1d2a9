"""What a link could carry: the rate of HCA ports and network interfaces, from sysfs.

Formats: Linux Documentation/ABI/stable/sysfs-class-infiniband (`rate`, read by discovery/fabric.py) and
Documentation/ABI/testing/sysfs-class-net (`speed`, Mbit/s, -1 when unknown).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..discovery.fabric import HcaPort
from ..discovery.pci import SYSFS


def link_gbs(devices: Iterable[str], ports: Iterable[HcaPort], sysfs: Path = SYSFS) -> float | None:
    """10^9 bytes per second of all these devices together; None when none of their rates is known.

    `devices` are as UCX names them: `mlx5_0:1`, `eth0`. What has no link, such as a GPU, adds nothing.
    """
    known = {port.name: port.rate_gbps for port in ports if port.rate_gbps > 0}
    rates = [known.get(name) or interface_gbps(name, sysfs) for name in devices]
    found = [rate for rate in rates if rate]
    return sum(found) / 8 if found else None


def interface_gbps(name: str, sysfs: Path = SYSFS) -> float | None:
    """Gbit/s of a network interface; None where the kernel does not know.

    An interface that is neither hardware nor on top of some, such as one end of a veth pair, says 10 Gbit/s
    whatever it does: that is no rate.
    """
    interface = sysfs / "class" / "net" / name
    real = (interface / "device").exists() or any(interface.glob("lower_*"))
    if not real:
        return None
    try:
        speed = int((interface / "speed").read_text())
    except (OSError, ValueError):
        # An interface that is down answers EINVAL.
        return None
    return speed / 1000 if speed > 0 else None
