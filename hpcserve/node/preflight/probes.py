"""Which probes a node has: one for each set of transport variables that its replicas get."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from ... import engines
from ...engines.base import EngineContext
from ...plan.plan import Plan, ReplicaPlan
from ..agent.environment import scrub
from ..agent.transfer import transfer_devices
from ..discovery.facts import Roster
from .records import Probe

_TRANSPORT = ("UCX_", "NIXL_")
"""What decides how NIXL moves bytes. Two replicas with the same need one probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A probe of this node, and the whole environment that its process gets."""

    probe: Probe
    environ: Mapping[str, str]


def probes_on(plan: Plan, roster: Roster, rank: int, environ: Mapping[str, str]) -> tuple[Placed, ...]:
    """Of node `rank`. Raises ConfigError for what the engine's adapter refuses."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[ReplicaPlan, Mapping[str, str]]]] = {}
    for replica in plan.on_node(rank):
        if replica.role != "aggregated":
            # As the agent starts the replica: what is measured is what serving will use.
            environment = {**scrub(environ), **_added(plan, roster, rank, replica)}
            key = tuple(sorted(_transport(environment).items()))
            groups.setdefault(key, []).append((replica, environment))
    placed = []
    for number, (variables, members) in enumerate(groups.items()):
        names = dict(variables)
        probe = Probe(
            name=f"{rank}.{number}",
            rank=rank,
            node=node_name(roster, rank),
            replicas=tuple(replica.name for replica, _ in members),
            prefill=any(replica.role == "prefill" for replica, _ in members),
            decode=any(replica.role == "decode" for replica, _ in members),
            devices=tuple(name for name in names.get("UCX_NET_DEVICES", "").split(",") if name),
            env=names,
        )
        placed.append(Placed(probe=probe, environ=members[0][1]))
    return tuple(placed)


def node_name(roster: Roster, rank: int) -> str:
    """What a rank's node is called, also where several ranks are on one machine."""
    name = roster.ranks[rank].node
    alone = sum(facts.node == name for facts in roster.ranks) == 1
    return name if alone else f"{name} (rank {rank})"


def _added(plan: Plan, roster: Roster, rank: int, replica: ReplicaPlan) -> Mapping[str, str]:
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
        fabric_env=transfer_devices(plan, facts, replica, roster.ranks).env,
        python=sys.executable,
        scratch=tempfile.gettempdir(),
        gpu_names=tuple(gpu.visible for gpu in facts.gpus),
    )
    return engine.command(context).env


def _transport(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_TRANSPORT)}
