"""fabric.json: what was found and derived on each node, with reasons, for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...plan.plan import Plan, ReplicaPlan
from ..agent.transfer import given, rails_of, transfer_devices
from ..discovery.facts import RankFacts
from .rails import GpuRails, NodeRails

_TRANSPORT = ("UCX_", "NCCL_", "GLOO_", "NIXL_", "FI_")


def report(plan: Plan, ranks: Sequence[RankFacts]) -> dict[str, Any]:
    """The document: `nodes` as they were found, `replicas` with their variables on each of their nodes."""
    return {
        "network": plan.site.network.kind,
        "nodes": [_node(plan, facts) for facts in ranks],
        "replicas": [
            {
                "replica": replica.name,
                "node": facts.node,
                "kv_over_nvlink": transfer_devices(plan, facts, replica, ranks).kv_over_nvlink,
                "settings": list(_settings(plan, facts, replica, ranks)),
            }
            for replica in plan.replicas
            for facts in ranks
            if facts.rank in replica.nodes
        ],
    }


def _node(plan: Plan, facts: RankFacts) -> dict[str, Any]:
    rails = rails_of(plan, facts)
    used = {port.name for port in rails.ports}
    return {
        "node": facts.node,
        "rank": facts.rank,
        "interface": facts.interface,
        "gpus": [_gpu(entry, rails) for entry in rails.gpus],
        "ports": [
            {
                "name": port.name,
                "link_layer": port.link_layer,
                "state": port.trouble,
                "rate_gbps": port.rate_gbps,
                "numa": port.numa,
                "gid_index": port.gid_index,
                "used": port.name in used,
                "why": rails.left_out.get(port.name, "a rail"),
            }
            for port in facts.hcas
        ],
        "slingshot": [device.name for device in facts.cxis],
        "nvlink_domain": facts.nvlink_domain,
        "nvlink_trouble": facts.nvlink_trouble,
        "imex": None
        if facts.imex is None
        else {"channels": list(facts.imex.channels), "status": facts.imex.status},
        "leaf": facts.leaf_switch,
    }


def _gpu(entry: GpuRails, rails: NodeRails) -> dict[str, Any]:
    return {
        "index": entry.gpu.index,
        "name": entry.gpu.name,
        "numa": entry.gpu.numa,
        "ports": [port.name for port in entry.ports],
        "relation": entry.relation.name if entry.relation is not None else None,
        "lost": [f"{port.name}: {rails.left_out[port.name]}" for port in entry.lost],
    }


def _settings(
    plan: Plan, facts: RankFacts, replica: ReplicaPlan, ranks: Sequence[RankFacts]
) -> Iterator[dict[str, str]]:
    """In the order of their weight: derived ones, and the site's and the model's in their place."""
    above = given(plan, replica)
    for setting in transfer_devices(plan, facts, replica, ranks).settings:
        value = above.pop(setting.name, None)
        if value is None:
            yield {"name": setting.name, "value": setting.value, "why": setting.why}
        else:
            why = f"{_origin(plan, setting.name, value)}; derived was {setting.value}: {setting.why}"
            yield {"name": setting.name, "value": value, "why": why}
    for name, value in above.items():
        if name.startswith(_TRANSPORT):
            yield {"name": name, "value": value, "why": _origin(plan, name, value)}


def _origin(plan: Plan, name: str, value: str) -> str:
    if plan.site.network.env.get(name) == value and name not in plan.model.env:
        return f"`network.env` of site {plan.site.name}"
    return "`env` of model.yaml"
