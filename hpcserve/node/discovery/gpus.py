"""The GPUs this job may use on this node, without importing CUDA or torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .pci import SYSFS, numa_node, pci_device, resolved

_QUERY = "index,uuid,pci.bus_id,name,memory.total"
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. `index` counts the visible ones; `visible` is its name in CUDA_VISIBLE_DEVICES."""

    index: int
    visible: str
    uuid: str | None = None
    bdf: str | None = None
    name: str | None = None
    memory_mib: int | None = None
    numa: int | None = None
    pci: str = ""
    """Resolved sysfs path of the device; empty where sysfs has none."""


def find_gpus(
    environ: Mapping[str, str], *, sysfs: Path = SYSFS, listing: str | None = None
) -> tuple[Gpu, ...]:
    """GPUs in the order CUDA numbers them.

    `listing` is nvidia-smi's CSV (asked for when None). Without nvidia-smi, CUDA_VISIBLE_DEVICES
    still tells how many GPUs Slurm granted.
    """
    rows = parse_listing(_ask_smi(environ) if listing is None else listing)
    allowed = environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        names = [name.strip() for name in allowed.split(",") if name.strip()]
        chosen = [_named(name, rows) for name in names]
    else:
        chosen = [(str(row["index"]), row) for row in rows]
    return tuple(_gpu(index, name, row, sysfs) for index, (name, row) in enumerate(chosen))


def parse_listing(text: str) -> list[dict[str, str]]:
    """Rows of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`."""
    keys = _QUERY.split(",")
    rows = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(keys):
            rows.append(dict(zip(keys, values, strict=True)))
    return rows


def full_report(environ: Mapping[str, str]) -> str:
    """`nvidia-smi -q`; "" without it."""
    return _run_smi(environ, "-q")


def driver_version(path: Path = _DRIVER) -> str | None:
    """The NVIDIA kernel driver's version; None without one."""
    try:
        found = re.search(r"Kernel Module\S*(?: for \S+)?\s+(\d[\d.]+)", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _named(name: str, rows: list[dict[str, str]]) -> tuple[str, dict[str, str]]:
    for row in rows:
        if name in (row["index"], row["uuid"]):
            return name, row
    return name, {}


def _gpu(index: int, name: str, row: Mapping[str, str], sysfs: Path) -> Gpu:
    bdf = row.get("pci.bus_id")
    device = pci_device(bdf, sysfs) if bdf else None
    memory = row.get("memory.total", "")
    return Gpu(
        index=index,
        visible=name,
        uuid=row.get("uuid"),
        bdf=bdf,
        name=row.get("name"),
        memory_mib=int(memory) if memory.isdecimal() else None,
        numa=numa_node(device) if device else None,
        pci=resolved(device) if device else "",
    )


def _ask_smi(environ: Mapping[str, str]) -> str:
    return _run_smi(environ, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")


def _run_smi(environ: Mapping[str, str], *arguments: str) -> str:
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        # A wedged driver. The engine will say so; the rendezvous must not hang on it.
        return ""
    return done.stdout if done.returncode == 0 else ""
