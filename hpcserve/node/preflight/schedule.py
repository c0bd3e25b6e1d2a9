"""Who is measured with whom, and when. Pure.

In each round a node is in one pair at most, so pairs share no link. Between nodes it is the round robin of
two teams: round r pairs the i-th prefill node with decode node i + r. Rounds in which a node has its first
pair come before all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .records import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    pairs: tuple[tuple[Probe, Probe], ...]
    """Prefill and decode."""
    first: bool
    """It has a probe that was in no pair before."""


def rounds(probes: Sequence[Probe]) -> tuple[Round, ...]:
    """All pairs of a prefill and a decode probe on different nodes, each once."""
    prefill = _by_node([probe for probe in probes if probe.prefill])
    decode = _by_node([probe for probe in probes if probe.decode])
    if not prefill or not decode:
        return ()
    layers = max(len(one) for one in prefill) * max(len(one) for one in decode)
    found: list[Round] = []
    seen: set[str] = set()
    for layer in range(layers):
        for shift in _shifts(len(prefill), len(decode)):
            for pairs in _apart(_pairs(prefill, decode, shift, layer)):
                names = {probe.name for pair in pairs for probe in pair}
                found.append(Round(pairs=pairs, first=not names <= seen))
                seen |= names
    return tuple(sorted(found, key=lambda one: not one.first))


def _by_node(probes: Sequence[Probe]) -> list[list[Probe]]:
    nodes: dict[int, list[Probe]] = {}
    for probe in sorted(probes, key=lambda probe: (probe.rank, probe.name)):
        nodes.setdefault(probe.rank, []).append(probe)
    return list(nodes.values())


def _shifts(prefill: int, decode: int) -> list[int]:
    """Shifts of the round robin: first those a whole team apart, which bring new nodes each time."""
    small, large = sorted((prefill, decode))
    return [shift for start in range(small) for shift in range(start, large, small)]


def _matched(
    prefill: list[list[Probe]], decode: list[list[Probe]], shift: int
) -> list[tuple[list[Probe], list[Probe]]]:
    if len(prefill) <= len(decode):
        return [(one, decode[(place + shift) % len(decode)]) for place, one in enumerate(prefill)]
    return [(prefill[(place + shift) % len(prefill)], other) for place, other in enumerate(decode)]


def _pairs(
    prefill: list[list[Probe]], decode: list[list[Probe]], shift: int, layer: int
) -> list[tuple[Probe, Probe]]:
    found = []
    for one, other in _matched(prefill, decode, shift):
        places = _combination(len(one), len(other), layer)
        if places is not None and one[0].rank != other[0].rank:
            found.append((one[places[0]], other[places[1]]))
    return found


def _combination(prefill: int, decode: int, layer: int) -> tuple[int, int] | None:
    """The layer-th of the pairs of two nodes' probes, along diagonals; None when there are fewer."""
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
