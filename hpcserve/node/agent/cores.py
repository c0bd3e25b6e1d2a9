"""Gives each worker of the engines on the CPU cores of its own.

Workers that share cores stall each other: vLLM's thread pools spin, and NIXL pins threads. Ranks
may share a machine without knowing it, so the roster's machine ids decide, not host names. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...plan.plan import Plan
from ..discovery.facts import RankFacts

Place = tuple[int, str]
"""A process of a replica: (rank, replica's name)."""


def share_cores(plan: Plan, ranks: Sequence[RankFacts]) -> Mapping[Place, tuple[tuple[int, ...], ...]]:
    """Cores of each worker of every engine process; empty on `device: cuda`, where the engine decides."""
    if plan.device != "cpu":
        return {}
    groups: dict[tuple[str, tuple[int, ...]], list[Place]] = {}
    for facts in sorted(ranks, key=lambda entry: entry.rank):
        places = groups.setdefault((facts.machine_id, facts.cpus), [])
        for replica in plan.on_node(facts.rank):
            places += [(facts.rank, replica.name)] * len(replica.gpus)
    shares: dict[Place, tuple[tuple[int, ...], ...]] = {}
    for (_, cores), places in groups.items():
        for place, share in zip(places, split(cores, len(places)), strict=True):
            shares[place] = (*shares.get(place, ()), share)
    return shares


def split(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """`count` runs of cores, as equal as possible; with more workers than cores they take turns."""
    if count > len(cores):
        return [(cores[place % len(cores)],) for place in range(count)] if cores else [()] * count
    return [
        tuple(cores[place * len(cores) // count : (place + 1) * len(cores) // count])
        for place in range(count)
    ]
