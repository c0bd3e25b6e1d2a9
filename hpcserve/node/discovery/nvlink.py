"""The NVLink fabric between nodes (GB200 NVL72 and its like), and IMEX, which lets a job use it.

Two GPUs reach each other's memory over it when ClusterUUID and CliqueId of `nvidia-smi -q` are equal on
both, and both processes may open an IMEX channel: NVIDIA's IMEX guide.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .pci import children

CHANNELS = Path("/dev/nvidia-caps-imex-channels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """What `nvidia-smi -q` says about the fabric, over all GPUs of the node."""

    domain: str | None = None
    """`CLUSTERUUID.CLIQUEID`; None where there is no fabric between nodes, or not all GPUs are in it."""
    trouble: str | None = None
    """What keeps GPUs out of it; None where nothing does, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imex:
    """This node's side of IMEX, as this process sees it."""

    channels: tuple[int, ...] = ()
    """Channels that this user may open, in this container."""
    status: str | None = None
    """Of the domain, by its daemon: `UP`, `DEGRADED`, `DOWN`; None where the daemon can't be asked."""
    daemon: str | None = None
    """Of the node's own daemon, such as `READY` or `WAITING_FOR_PEERS`; None where it can't be asked."""

    @property
    def trouble(self) -> str | None:
        """Why no memory crosses NVLink from here; None where it may."""
        if not self.channels:
            return "it has no IMEX channel that this job may open"
        if self.status not in (None, "UP", "DEGRADED"):
            return f"its IMEX domain is {self.status}"
        # A domain is degraded by any node that is switched off, of whoever's job: what counts is the own one.
        if self.status == "DEGRADED" and self.daemon != "READY":
            return f"its IMEX domain is DEGRADED, and its own daemon {self.daemon or 'says nothing'}"
        return None


def parse_fabric(report: str) -> Fabric:
    """Read `nvidia-smi -q`.

    NVSwitch inside one machine reports a fabric too, without a UUID: that one joins no nodes.
    """
    sections = re.finditer(r"^(\s*)Fabric[ \t]*\n((?:\1[ \t]+.*\n?)*)", report, flags=re.M)
    found = [_gpu_fabric(section[2]) for section in sections]
    domains = {fabric.domain for fabric in found}
    if domains <= {None}:
        return Fabric()
    for fabric in found:
        if fabric.trouble is not None:
            return Fabric(trouble=fabric.trouble)
    if len(domains) > 1:
        return Fabric(trouble="not all GPUs of the node are in the same clique")
    return found[0]


def _gpu_fabric(section: str) -> Fabric:
    def value(name: str) -> str | None:
        match = re.search(rf"^\s*{name}\s*:\s*(.*?)\s*$", section, flags=re.M)
        return match[1] if match else None

    cluster = value("ClusterUUID") or "N/A"
    if cluster == "N/A" or not cluster.replace("-", "").strip("0"):
        return Fabric()
    domain = f"{cluster}.{value('CliqueId') or 0}"
    # Older drivers tell less: what is not told is no trouble.
    for name, good in (("State", "Completed"), ("Status", "Success"), ("Summary", None)):
        told = value(name)
        bad = told == "Unhealthy" if good is None else told not in (None, good)
        if bad:
            what = "health" if good is None else name.lower()
            return Fabric(domain=domain, trouble=f"{what} {told}")
    return Fabric(domain=domain)


def find_imex(environ: Mapping[str, str], channels: Path = CHANNELS) -> Imex:
    """Look for channels, and ask the daemon where its program is. Takes up to ten seconds if it hangs."""
    numbers = [
        int(entry.name.removeprefix("channel"))
        for entry in children(channels)
        if re.fullmatch(r"channel\d+", entry.name) and os.access(entry, os.R_OK | os.W_OK)
    ]
    status = _domain_status(_ask(environ, "-N", "-j"))
    daemon = _ask(environ, "-q") if status == "DEGRADED" else None
    return Imex(channels=tuple(sorted(numbers)), status=status, daemon=(daemon or "").strip() or None)


def _ask(environ: Mapping[str, str], *what: str) -> str | None:
    """What nvidia-imex-ctl prints; None without a daemon, or with one that may not be asked."""
    program = shutil.which("nvidia-imex-ctl", path=environ.get("PATH"))
    if program is None:
        return None
    try:
        done = subprocess.run([program, *what], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        # The channels have the last word.
        return None
    return done.stdout


def _domain_status(told: str | None) -> str | None:
    try:
        answer = json.loads(told or "")
    except ValueError:
        return None
    status = answer.get("status") if isinstance(answer, dict) else None
    return status if isinstance(status, str) else None
