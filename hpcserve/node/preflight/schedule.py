"""Who is measured with whom, and when. Pure.

In each round a node is in one pair at most, so pairs share no link. Between nodes it is the round robin of
two teams: round r pairs the i-th prefill node with decode node i + r. Rounds in which a probe has its first
pair come before all others.

Rails go together as KV does: the first GPUs of both replicas, and so on. On some fabrics they are networks of
their own, and the first of one node never meets the second of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .records import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    pairs: tuple[tuple[Probe, Probe], ...]
    """Prefill and decode."""
    first: bool
    """It has a probe that was in no pair before."""


def rounds(probes: Sequence[Probe]) -> tuple[Round, ...]:
    """Pairs of a prefill and a decode probe on different nodes: each group with each other, rail by rail."""
    prefill = _by_node([probe for probe in probes if probe.prefill])
    decode = _by_node([probe for probe in probes if probe.decode])
    if not prefill or not decode:
        return ()
    layers = max(len(one) for one in prefill) * max(len(one) for one in decode)
    rails = max(len(group) for node in (*prefill, *decode) for group in node)
    found: list[Round] = []
    seen: set[str] = set()
    for layer, rail in product(range(layers), range(rails)):
        for shift in _shifts(len(prefill), len(decode)):
            for pairs in _apart(_pairs(prefill, decode, shift, layer, rail)):
                names = {probe.name for pair in pairs for probe in pair}
                found.append(Round(pairs=pairs, first=not names <= seen))
                seen |= names
    return tuple(sorted(found, key=lambda one: not one.first))


_Node = list[list[Probe]]
"""A node's groups of probes, and in each the rails."""


def _by_node(probes: Sequence[Probe]) -> list[_Node]:
    nodes: dict[int, dict[int, list[Probe]]] = {}
    for probe in sorted(probes, key=lambda probe: (probe.rank, probe.group)):
        nodes.setdefault(probe.rank, {}).setdefault(probe.group, []).append(probe)
    return [list(groups.values()) for groups in nodes.values()]


def _shifts(prefill: int, decode: int) -> list[int]:
    """Shifts of the round robin: first those a whole team apart, which bring new nodes each time."""
    small, large = sorted((prefill, decode))
    return [shift for start in range(small) for shift in range(start, large, small)]


def _matched(prefill: list[_Node], decode: list[_Node], shift: int) -> list[tuple[_Node, _Node]]:
    if len(prefill) <= len(decode):
        return [(one, decode[(place + shift) % len(decode)]) for place, one in enumerate(prefill)]
    return [(prefill[(place + shift) % len(prefill)], other) for place, other in enumerate(decode)]


def _pairs(
    prefill: list[_Node], decode: list[_Node], shift: int, layer: int, rail: int
) -> list[tuple[Probe, Probe]]:
    found = []
    for one, other in _matched(prefill, decode, shift):
        places = _combination(len(one), len(other), layer)
        if places is None:
            continue
        own, theirs = one[places[0]], other[places[1]]
        rails = max(len(own), len(theirs))
        if rail < rails and own[0].rank != theirs[0].rank:
            # Two GPUs send to one, or one to two, where the replicas' sizes differ.
            found.append((own[rail * len(own) // rails], theirs[rail * len(theirs) // rails]))
    return found


def _combination(prefill: int, decode: int, layer: int) -> tuple[int, int] | None:
    """The layer-th of the pairs of two nodes' groups, along diagonals; None when there are fewer."""
    if layer >= prefill * decode:
        return None
    small, large = sorted((prefill, decode))
    turn, place = divmod(layer, large)
    other = (place + turn) % small
    return (place, other) if prefill >= decode else (other, place)


def _apart(pairs: Sequence[tuple[Probe, Probe]]) -> list[tuple[tuple[Probe, Probe], ...]]:
    """Split where a node that has prefill and decode replicas would be in two pairs at once."""
    parts: list[tuple[set[int], list[tuple[Probe, Probe]]]] = []
    for pair in pairs:
        ranks = {pair[0].rank, pair[1].rank}
        for busy, part in parts:
            if not busy & ranks:
                busy |= ranks
                part.append(pair)
                break
        else:
            parts.append((set(ranks), [pair]))
    return [tuple(part) for _, part in parts]
