"""Gives each engine on the CPU cores of its own.

Engines that share cores stall each other: vLLM's thread pools spin, and NIXL pins threads. Ranks
may share a machine without knowing it, so the roster's machine ids decide, not host names. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...plan.plan import Plan
from ..discovery.facts import RankFacts

Place = tuple[int, str]
"""A process of a replica: (rank, replica's name)."""


def share_cores(plan: Plan, ranks: Sequence[RankFacts]) -> Mapping[Place, tuple[int, ...]]:
    """Cores of every engine process; empty on `device: cuda`, where the engine decides."""
    if plan.device != "cpu":
        return {}
    groups: dict[tuple[str, tuple[int, ...]], list[Place]] = {}
    for facts in sorted(ranks, key=lambda entry: entry.rank):
        places = groups.setdefault((facts.machine_id, facts.cpus), [])
        places.extend((facts.rank, replica.name) for replica in plan.on_node(facts.rank))
    shares: dict[Place, tuple[int, ...]] = {}
    for (_, cores), places in groups.items():
        for place, share in zip(places, split(cores, len(places)), strict=True):
            shares[place] = share
    return shares


def split(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """`count` runs of cores, as equal as possible; with more processes than cores they take turns."""
    if count > len(cores):
        return [(cores[place % len(cores)],) for place in range(count)] if cores else [()] * count
    return [
        tuple(cores[place * len(cores) // count : (place + 1) * len(cores) // count])
        for place in range(count)
    ]
