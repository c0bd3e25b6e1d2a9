"""Builds a node of one of the machines in trees/: its sysfs, its programs, its devices.

The trees are YAML: `gpus` and `hcas` with their PCI address and the bridges above them, what the port files
say, `topo` (the rows of `nvidia-smi topo -m` that the source shows), and what discovery has to make of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpcserve.node.discovery.fabric import hca_ports
from hpcserve.node.discovery.facts import ModelFact, RankFacts
from hpcserve.node.discovery.gpus import find_gpus, full_report
from hpcserve.node.discovery.nvlink import find_imex, parse_fabric
from hpcserve.node.discovery.slingshot import cxi_devices
from hpcserve.node.discovery.topology import leaf_of

TREES = Path(__file__).with_name("trees")
MACHINES = sorted(path.stem for path in TREES.glob("*.yaml"))
RAILED = [name for name in MACHINES if name != "gh200-slingshot"]


def tree(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((TREES / f"{name}.yaml").read_text()))


@dataclass
class Node:
    """One node below `root`. Change `tree` before `build()`, or files of `sysfs` after it."""

    root: Path
    tree: dict[str, Any]
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def sysfs(self) -> Path:
        return self.root / "sys"

    def build(self) -> Node:
        for index, gpu in self.tree["gpus"].items():
            self._device(gpu)
            gpu.setdefault("uuid", f"GPU-{index}")
        for name, hca in self.tree.get("hcas", {}).items():
            self._hca(name, hca)
        for name, cxi in self.tree.get("cxis", {}).items():
            device = self._device(cxi)
            (device / "net" / cxi["interface"]).mkdir(parents=True)
            self._class("cxi", name, device)
        self._programs()
        return self

    def facts(self, rank: int = 0, node: str = "n0") -> RankFacts:
        """What `gather` would find here."""
        fabric = parse_fabric(full_report(self.environ))
        return RankFacts(
            rank=rank,
            node=node,
            address=f"10.0.0.{rank + 1}",
            interface="ib0",
            machine_id=f"m{rank}",
            cpus=(0,),
            gpus=find_gpus(self.environ, sysfs=self.sysfs),
            hcas=hca_ports(self.sysfs),
            cxis=cxi_devices(self.sysfs),
            nvlink_domain=fabric.domain,
            nvlink_trouble=fabric.trouble,
            imex=find_imex(self.environ, self.root / "dev") if fabric.domain is not None else None,
            leaf_switch=leaf_of(self.environ),
            model=ModelFact(path="m"),
        )

    def port(self, hca: str) -> Path:
        """The directory of an HCA's port, to change what its files say."""
        return self.sysfs / "class" / "infiniband" / hca / "ports" / "1"

    def _device(self, entry: Mapping[str, Any]) -> Path:
        root, *bridges = entry["below"].split()
        domain = root[:4]
        parts = [f"pci{root}", *(_full(part, domain) for part in (*bridges, entry["bdf"]))]
        device = self.sysfs.joinpath("devices", *parts)
        device.mkdir(parents=True, exist_ok=True)
        (device / "numa_node").write_text(f"{entry['numa']}\n")
        bus = self.sysfs / "bus" / "pci" / "devices"
        bus.mkdir(parents=True, exist_ok=True)
        (bus / parts[-1]).symlink_to(device)
        return device

    def _class(self, kind: str, name: str, device: Path) -> Path:
        """As in the kernel: the class has a link to a directory below the PCI device, which links back."""
        own = device / kind / name
        own.mkdir(parents=True)
        (own / "device").symlink_to(device)
        listed = self.sysfs / "class" / kind
        listed.mkdir(parents=True, exist_ok=True)
        (listed / name).symlink_to(own)
        return own

    def _hca(self, name: str, hca: Mapping[str, Any]) -> None:
        port = self._class("infiniband", name, self._device(hca)) / "ports" / "1"
        port.mkdir(parents=True)
        files = {"state": "state", "phys_state": "phys", "rate": "rate", "link_layer": "link"}
        for file, key in files.items():
            (port / file).write_text(f"{hca[key]}\n")
        for index, entry in hca.get("gids", {}).items():
            gid, _, kind = entry.partition(" ")
            for file, value in ((port / "gids", gid), (port / "gid_attrs" / "types", kind)):
                file.mkdir(parents=True, exist_ok=True)
                (file / str(index)).write_text(value + "\n")

    def _programs(self) -> None:
        programs = self.root / "bin"
        programs.mkdir()
        about = self.tree["gpu"]
        listing = "".join(
            f"{index}, {gpu['uuid']}, {_smi(gpu)}, {about['name']}, {about['memory_mib']}\n"
            for index, gpu in self.tree["gpus"].items()
        )
        report = "".join(
            f"GPU {_smi(gpu)}\n{self.tree.get('fabric_report', '')}" for gpu in self.tree["gpus"].values()
        )
        (self.root / "listing").write_text(listing)
        (self.root / "report").write_text(report)
        _program(
            programs / "nvidia-smi",
            f'case "$1" in -q) cat {self.root}/report;; *) cat {self.root}/listing;; esac',
        )
        imex = self.tree.get("imex")
        if imex is not None:
            (self.root / "dev").mkdir()
            for number in imex["channels"]:
                (self.root / "dev" / f"channel{number}").touch()
            told = json.dumps({"nodes": {}, "status": imex["status"]})
            daemon = imex.get("daemon", "READY")
            _program(
                programs / "nvidia-imex-ctl", f"case \"$1\" in -q) echo {daemon};; *) echo '{told}';; esac"
            )
        self.environ |= {"PATH": f"{programs}:/usr/bin:/bin", **self.tree.get("topology", {})}


def _full(part: str, domain: str) -> str:
    return part if re.fullmatch(r"[0-9a-f]{4}:.*", part) else f"{domain}:{part}"


def _smi(gpu: Mapping[str, Any]) -> str:
    """A PCI address as nvidia-smi prints it."""
    return "0000" + _full(gpu["bdf"], gpu["below"][:4]).upper()


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def matrix(rows: str) -> dict[tuple[int, str], str]:
    """`topo` as (GPU's index, HCA) -> relation."""
    header, *lines = rows.splitlines()
    hcas = header.split()
    found = {}
    for line in lines:
        gpu, *cells = line.split()
        assert len(cells) == len(hcas), f"{gpu}: {len(cells)} cells for {len(hcas)} HCAs"
        found |= {(int(gpu.removeprefix("GPU")), hca): cell for hca, cell in zip(hcas, cells, strict=True)}
    return found
