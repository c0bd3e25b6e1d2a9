"""Which probes a node has: one for each set of transport variables that its replicas get, and each rail.

With several GPUs, an engine has a NIXL agent beside each, and UCX takes the ports nearest to the memory it is
given. So of the GPUs with the same nearest ports one is measured, in a process of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ... import engines
from ...engines.base import EngineContext
from ...plan.plan import Plan, ReplicaPlan
from ..agent.environment import scrub
from ..agent.transfer import Devices, rails_of, transfer_devices
from ..discovery.facts import RankFacts, Roster
from .records import Probe

_TRANSPORT = ("UCX_", "NIXL_")
"""What decides how NIXL moves bytes. Two replicas with the same need one probe."""
_RDMA = ("infiniband", "roce")
_OVER_NVLINK = "UCX_CUDA_IPC_ENABLE_MNNVL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A probe of this node, and the whole environment that its process gets."""

    probe: Probe
    device: str
    """Where its buffers are, as torch calls it: `cpu`, or one of the replica's GPUs such as `cuda:2`."""
    environ: Mapping[str, str]
    added: Mapping[str, str]
    """The part of it that is the replica's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A replica of this node, with what its engine gets."""

    replica: ReplicaPlan
    environ: Mapping[str, str]
    added: Mapping[str, str]
    nvlink: bool

    @property
    def variables(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(_transport(self.environ).items()))

    @property
    def allowed(self) -> tuple[str, ...]:
        names = self.environ.get("UCX_NET_DEVICES", "").split(",")
        return tuple(name for name in names if name)


def probes_on(plan: Plan, roster: Roster, rank: int, environ: Mapping[str, str]) -> tuple[Placed, ...]:
    """Of node `rank`. Raises ConfigError for what the engine's adapter refuses."""
    groups: dict[tuple[bool, tuple[tuple[str, str], ...]], list[_Member]] = {}
    for replica in plan.on_node(rank):
        if replica.role != "aggregated":
            member = _member(plan, roster, rank, replica, environ)
            groups.setdefault((member.nvlink, member.variables), []).append(member)
    placed: list[Placed] = []
    for number, members in enumerate(groups.values()):
        rails = _rails(plan, roster.ranks[rank], members)
        for rail, users in rails.items():
            member, gpu = users[0]
            replicas = list({user.replica.name: user.replica for user, _ in users}.values())
            probe = Probe(
                name=f"{rank}.{len(placed)}",
                rank=rank,
                node=node_name(roster, rank),
                replicas=tuple(replica.name for replica in replicas),
                prefill=any(replica.role == "prefill" for replica in replicas),
                decode=any(replica.role == "decode" for replica in replicas),
                devices=member.allowed,
                env=dict(member.variables),
                group=number,
                gpu=gpu if len(rails) > 1 else None,
                rail=rail,
                nvlink=member.nvlink,
            )
            place = 0 if gpu is None else member.replica.gpus.index(gpu)
            device = f"cuda:{place}" if plan.device == "cuda" else "cpu"
            placed.append(Placed(probe=probe, device=device, environ=member.environ, added=member.added))
    return tuple(placed)


def node_name(roster: Roster, rank: int) -> str:
    """What a rank's node is called, also where several ranks are on one machine."""
    name = roster.ranks[rank].node
    alone = sum(facts.node == name for facts in roster.ranks) == 1
    return name if alone else f"{name} (rank {rank})"


def _member(
    plan: Plan, roster: Roster, rank: int, replica: ReplicaPlan, environ: Mapping[str, str]
) -> _Member:
    """As the agent starts the replica: what is measured is what serving will use.

    But for NVLink to other nodes: memory of cudaMalloc, which torch's is, does not cross it, for UCX shares
    that by a handle that is good on its own node only (uct_cuda_ipc_mem_add_reg).
    """
    devices = transfer_devices(plan, roster.ranks[rank], replica, roster.ranks)
    added = _added(plan, roster, rank, replica, devices)
    if devices.kv_over_nvlink:
        added = {**added, _OVER_NVLINK: "n"}
    environment = {**scrub(environ), **added}
    return _Member(replica=replica, environ=environment, added=added, nvlink=devices.kv_over_nvlink)


_Rails = dict[tuple[str, ...], list[tuple[_Member, int | None]]]


def _rails(plan: Plan, facts: RankFacts, members: Sequence[_Member]) -> _Rails:
    """The replicas and GPUs of each set of nearest ports, in the order of the GPUs.

    One without ports, and without a GPU, where nobody knows which are near.
    """
    found: _Rails = {}
    if plan.device == "cuda" and plan.site.network.kind in _RDMA:
        near = {entry.gpu.index: entry.ports for entry in rails_of(plan, facts).gpus}
        for member in members:
            for gpu in member.replica.gpus:
                rail = tuple(p.name for p in near.get(gpu, ()) if p.name in member.allowed)
                found.setdefault(rail, []).append((member, gpu))
    if not found or () in found:
        return {(): [(member, None) for member in members]}
    return found


def _added(
    plan: Plan, roster: Roster, rank: int, replica: ReplicaPlan, devices: Devices
) -> Mapping[str, str]:
    engine = engines.of(plan.model)
    facts = roster.ranks[rank]
    context = EngineContext(
        plan=plan,
        replica=replica,
        node=replica.nodes.index(rank),
        address=facts.address,
        head_address=roster.ranks[replica.nodes[0]].address,
        # No process of the engine is started, so it needs no real ports.
        ports=dict.fromkeys(engine.ports(replica), "0"),
        model_path=plan.model.model,
        fabric_env=devices.env,
        kv_over_nvlink=devices.kv_over_nvlink,
        python=sys.executable,
        scratch=tempfile.gettempdir(),
        gpu_names=tuple(gpu.visible for gpu in facts.gpus),
    )
    return engine.command(context).env


def _transport(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_TRANSPORT)}
