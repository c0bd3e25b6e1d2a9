"""What the figures mean: which node, link or pair is cut or slow. Pure.

A pair is slow when its slowest operation is below half of the link's rate, or, where that is unknown or
nobody reaches it, below half of the median of the others. When all pairs of a node are slow and its partners
are fine with others, the node is what is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from .records import Broken, Outcome, Pair, Probe

HALF = 0.5
_MOST = 8
"""Findings of one kind that are told one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    message: str
    hint: str
    failed: bool = False
    """Bytes do not pass at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    findings: tuple[Finding, ...] = ()
    fatal: Finding | None = None
    """No prefill node reaches any decode node: loading a model would be for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blame:
    probes: tuple[Probe, ...]
    """All their pairs are bad, and a partner has a good one."""
    pairs: tuple[Pair, ...]
    """Bad, and none of those probes takes part."""


def judge(outcome: Outcome) -> Verdict:
    # Of KV over NVLink, figures of the network tell nothing.
    measured = [pair for pair in outcome.pairs if not pair.nvlink]
    failed = [pair for pair in measured if pair.broken is not None]
    whole = [pair for pair in measured if pair.broken is None]
    findings = [*_broken(outcome)]
    reasons = list(outcome.broken.values())
    # A node that was late, or whose process died, may be one that works; so may NVLink.
    certain = not outcome.nvlink and all(broken.cause == "backend" for broken in reasons)
    if not whole and certain and failed:
        return Verdict(findings=tuple(findings), fatal=_fatal(failed, outcome.unmeasured))
    if not whole and certain and reasons:
        return Verdict(findings=tuple(findings), fatal=_no_device(reasons[0]))
    findings += _failed(failed, measured)
    findings += _slow(whole)
    return Verdict(findings=tuple(findings))


def suspects(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Those that `judge` would name as slow, or name a node for: they deserve a second look."""
    whole = [pair for pair in pairs if pair.broken is None and not pair.nvlink]
    below, behind = _below(whole), _behind(whole)
    found = _ids([*behind, *(below if len(below) < len(whole) else [])])
    return tuple(pair for pair in whole if id(pair) in found)


# Nodes that took no part.


def _broken(outcome: Outcome) -> Iterable[Finding]:
    alike: dict[tuple[str, str | None], list[str]] = {}
    for node, broken in sorted(outcome.broken.items()):
        alike.setdefault((broken.message, broken.hint), []).append(node)
    for (message, hint), nodes in alike.items():
        yield Finding(
            message=f"no KV preflight of {_listed(nodes)}: {message}",
            hint=f"{hint + '; ' if hint else ''}`kv_preflight: false` in model.yaml leaves the preflight out",
        )


# Pairs that failed.


def _fatal(failed: Sequence[Pair], unmeasured: int) -> Finding:
    first = failed[0]
    assert first.broken is not None
    count = f"all {len(failed)} pairs failed" if len(failed) > 1 else "the only pair failed"
    if unmeasured:
        count += f" of those that could be tried ({unmeasured} could not)"
    return Finding(
        message=f"no prefill node reaches any decode node by NIXL: {count};"
        f" {first.name} over {_over(_allowed(first))}: {first.broken.message}",
        hint="are these the right devices (`network` of the site, `env` of model.yaml), and do the nodes"
        f" reach each other there? {_look(_allowed(first))}",
        failed=True,
    )


def _no_device(broken: Broken) -> Finding:
    return Finding(
        message=f"no prefill node reaches any decode node by NIXL: {broken.message}",
        hint="the engines would get the same devices: look at `network` of the site and `env` of model.yaml",
        failed=True,
    )


def _failed(failed: Sequence[Pair], measured: Sequence[Pair]) -> list[Finding]:
    blame = _blame(failed, measured)
    works = len(failed) < len(measured)
    findings = []
    for node, devices, pairs in _by_node(blame.probes, failed):
        broken = pairs[0].broken
        assert broken is not None
        partners = f"any of {len(pairs)} partners" if len(pairs) > 1 else _partner(pairs[0], node)
        findings.append(
            Finding(
                message=f"{node} can't move KV to {partners} over {_over(devices)}: {broken.message}",
                hint=f"{_look(devices)} on {node}; to leave it out: {_excluding(node)}",
                failed=True,
            )
        )
    for pair in blame.pairs:
        assert pair.broken is not None
        others = ", and does with others" if works else ""
        findings.append(
            Finding(
                message=f"KV can't move between {pair.prefill.label} and {pair.decode.label} over"
                f" {_over(_allowed(pair))}{others}: {pair.broken.message}",
                hint="look at the switches and routes between the two; their replicas serve with others"
                if works
                else f"nothing else could be measured, so this may be all pairs; {_look(_allowed(pair))}",
                failed=True,
            )
        )
    return _bounded(findings, "that move no KV")


# Pairs that are slow.


def _slow(pairs: Sequence[Pair]) -> list[Finding]:
    below, behind = _below(pairs), _behind(pairs)
    findings = []
    if below and len(below) == len(pairs):
        findings.append(_all_below(below))
        bad = behind
    else:
        either = _ids([*below, *behind])
        bad = [pair for pair in pairs if id(pair) in either]
    blame = _blame(bad, pairs)
    known = _ids(bad)
    rest = [_gbs(pair) for pair in pairs if id(pair) not in known]
    usual = median(rest) if rest else None
    named = []
    for node, devices, own in _by_node(blame.probes, bad):
        best = max(own, key=_gbs)
        each = f"all {len(own)} partners" if len(own) > 1 else _partner(best, node)
        named.append(
            Finding(
                message=f"{node} moves KV slowly with {each} over {_over(devices)}: {rate(_gbs(best))}"
                f"{' at best' if len(own) > 1 else ''}, {_compared(best, usual)}",
                hint=f"{_look(devices)} on {node} and on another node; to leave it out: {_excluding(node)}",
            )
        )
    for pair in blame.pairs:
        slowest = pair.slowest
        assert slowest is not None
        named.append(
            Finding(
                message=f"KV moves slowly between {pair.prefill.label} and {pair.decode.label} over"
                f" {_over(slowest.devices)}, and not with others: {rate(slowest.gbs)} from {slowest.source}"
                f" ({slowest.operation} by {slowest.initiator}), {_compared(pair, usual)}",
                hint="look at the switches and routes between the two",
            )
        )
    return findings + _bounded(named, "that are slow")


def _below(pairs: Sequence[Pair]) -> list[Pair]:
    """Those below half of their link's rate."""
    return [pair for pair in pairs if pair.ratio is not None and _short_of_its_link(pair)]


def _behind(pairs: Sequence[Pair]) -> list[Pair]:
    """Those below half of the median of the others: all of a probe's, or single ones.

    Not where the link's rate is known and half of it is reached.
    """
    rates = [_gbs(pair) for pair in pairs]
    ordered = sorted(range(len(pairs)), key=rates.__getitem__)
    own: dict[str, set[int]] = {}
    for place, pair in enumerate(pairs):
        for probe in (pair.prefill, pair.decode):
            own.setdefault(probe.name, set()).add(place)
    found: set[int] = set()
    for places in own.values():
        others = [rates[place] for place in ordered if place not in places]
        if others and max(rates[place] for place in places) < HALF * median(others):
            found |= places
    rest = [place for place in ordered if place not in found]
    values = [rates[place] for place in rest]
    for position, place in enumerate(rest):
        if len(rest) < 2 or values[position] >= HALF * _median_without(values, position):
            break  # those behind it in the order are faster
        found.add(place)
    return [pairs[place] for place in sorted(found) if _short_of_its_link(pairs[place])]


def _short_of_its_link(pair: Pair) -> bool:
    return pair.ratio is None or pair.ratio < HALF


def _median_without(ordered: Sequence[float], position: int) -> float:
    return median([*ordered[:position], *ordered[position + 1 :]])


def _all_below(below: Sequence[Pair]) -> Finding:
    worst = min(below, key=_gbs)
    slowest = worst.slowest
    assert slowest is not None and worst.link_gbs is not None
    where = f" in all {len(below)} pairs" if len(below) > 1 else ""
    tcp = not any(":" in device for device in slowest.devices)
    return Finding(
        message=f"KV moves at less than half of the link's rate{where}:"
        f" {worst.name} has {rate(slowest.gbs)} of {rate(worst.link_gbs)} over {_over(slowest.devices)}",
        hint="one TCP connection rarely fills a fast link; for speed the nodes need InfiniBand or RoCE"
        " (`network.kind` of the site)"
        if tcp
        else "is GPUDirect RDMA on (nvidia_peermem, or dma-buf), and is each GPU beside its HCA"
        " (`nvidia-smi topo -m`)?",
    )


# Who is to blame, and words.


def _blame(bad: Sequence[Pair], measured: Sequence[Pair]) -> _Blame:
    known = _ids(bad)
    good = {probe.name for pair in measured if id(pair) not in known for probe in (pair.prefill, pair.decode)}
    blamed: dict[str, Probe] = {}
    for pair in bad:
        for probe, partner in ((pair.prefill, pair.decode), (pair.decode, pair.prefill)):
            if probe.name not in good and partner.name in good:
                blamed[probe.name] = probe
    rest = tuple(pair for pair in bad if pair.prefill.name not in blamed and pair.decode.name not in blamed)
    return _Blame(probes=tuple(blamed.values()), pairs=rest)


def _ids(pairs: Iterable[Pair]) -> frozenset[int]:
    """To look a pair up among many: they are compared by identity."""
    return frozenset(map(id, pairs))


def _by_node(
    probes: Sequence[Probe], pairs: Sequence[Pair]
) -> Iterable[tuple[str, tuple[str, ...], list[Pair]]]:
    """Node, the devices of its probes, and their pairs."""
    nodes: dict[str, list[Probe]] = {}
    for probe in probes:
        nodes.setdefault(probe.node, []).append(probe)
    for node, own in nodes.items():
        names = {probe.name for probe in own}
        found = [pair for pair in pairs if pair.prefill.name in names or pair.decode.name in names]
        yield node, tuple(dict.fromkeys(name for pair in found for name in _used(pair, node))), found


def _used(pair: Pair, node: str) -> tuple[str, ...]:
    """The node's devices: those UCX used, else those it should use."""
    for figure in pair.figures:
        if figure.initiator == node and figure.devices:
            return figure.devices
    return pair.prefill.expected if pair.prefill.node == node else pair.decode.expected


def _allowed(pair: Pair) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*pair.prefill.expected, *pair.decode.expected)))


def _partner(pair: Pair, node: str) -> str:
    return pair.decode.node if pair.prefill.node == node else pair.prefill.node


def _compared(pair: Pair, usual: float | None) -> str:
    """`usual` is the median of the pairs that nothing is said about."""
    parts = []
    if pair.ratio is not None and pair.link_gbs is not None:
        parts.append(f"{pair.ratio:.0%} of the link's {rate(pair.link_gbs)}")
    if usual is not None:
        parts.append(f"others have {rate(usual)}")
    return ", ".join(parts)


def _gbs(pair: Pair) -> float:
    assert pair.gbs is not None, "only whole pairs are compared"
    return pair.gbs


def rate(gbs: float) -> str:
    """`12.3 GB/s`, `0.35 GB/s`, `1.2 MB/s`."""
    if gbs < 0.1:
        return f"{gbs * 1000:.3g} MB/s"
    return f"{gbs:.3g} GB/s"


def _over(devices: Sequence[str]) -> str:
    return ", ".join(devices) if devices else "whatever UCX chose"


def _look(devices: Sequence[str]) -> str:
    if any(":" in device for device in devices):
        return "look at `ibstat` and `perfquery` (width, speed, errors)"
    return f"look at `ip -s link` and `ethtool {devices[0] if devices else 'INTERFACE'}`"


def _excluding(node: str) -> str:
    return f"`slurm.extra: [--exclude={node}]` of the site"


def _listed(nodes: Sequence[str]) -> str:
    return f"{', '.join(nodes[:_MOST])}{' …' if len(nodes) > _MOST else ''}"


def _bounded(findings: list[Finding], what: str) -> list[Finding]:
    if len(findings) <= _MOST:
        return findings
    more = Finding(
        message=f"{len(findings) - _MOST} more nodes or pairs {what}",
        hint="preflight.json in the run directory has all of them",
        failed=findings[_MOST].failed,
    )
    return [*findings[:_MOST], more]
