"""The preflight for people and programs: a table, preflight.json, one event. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .records import Figure, Outcome, Pair, to_json
from .verdict import Verdict, rate

_ROWS = 64
"""Pairs in the table; preflight.json has all of them."""
_NODES = 8
"""Nodes that are named in one line."""
_NVLINK = "(KV: NVLink)"
_HEADER = ("PREFILL", "DECODE", "TO DECODE", "BACK", "LATENCY", "LINK", "PART", "TRANSPORT")


def table(outcome: Outcome) -> str:
    """One row for each pair: the slower of reading and writing, per direction. The slowest pairs first."""
    ordered = sorted(outcome.pairs, key=lambda pair: (pair.gbs is not None, pair.gbs or 0.0))
    rows = [_HEADER, *(_row(pair) for pair in ordered[:_ROWS])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [line.rstrip() for line in lines]
    if len(ordered) > _ROWS:
        lines.append(f"… and {len(ordered) - _ROWS} faster pairs; preflight.json has all of them")
    return "\n".join([*_title(outcome), *(lines if outcome.pairs else [])])


def _title(outcome: Outcome) -> Iterator[str]:
    count = len(outcome.pairs)
    plural = "s" if count != 1 else ""
    text = f"KV preflight: {count} pair{plural} measured by NIXL in {outcome.seconds:.1f} s"
    text += f" ({outcome.starting:.1f} s to start)"
    if outcome.cut_short:
        text += ", and then it was told to end"
    if outcome.unmeasured:
        text += f"; {outcome.unmeasured} not measured"
    yield text
    if outcome.nvlink:
        yield (
            "Between nodes that NVLink joins, KV goes over it. NVLink was not measured: what is marked"
            f" {_NVLINK!r} below is the network, and neither good nor bad for KV"
        )
    alike: dict[tuple[str, ...], list[str]] = {}
    for node, devices in unused_devices(outcome).items():
        alike.setdefault(devices, []).append(node)
    for devices, nodes in alike.items():
        names = f"{', '.join(nodes[:_NODES])}{' …' if len(nodes) > _NODES else ''}"
        yield f"Not measured on {names}, though engines may use it: {', '.join(devices)}"


def unused_devices(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    """By node, the devices that its probes were allowed and that no figure is about.

    A node is left out where UCX did not say what it used.
    """
    found: dict[str, tuple[str, ...]] = {}
    allowed: dict[str, dict[str, None]] = {}
    used: dict[str, set[str]] = {}
    for pair in outcome.pairs:
        for probe in (pair.prefill, pair.decode):
            allowed.setdefault(probe.node, {}).update(dict.fromkeys(probe.devices))
            if pair.broken is not None:
                # That it carries nothing is known of what it should have used.
                used.setdefault(probe.node, set()).update(probe.expected)
        for figure in pair.figures:
            named = figure.devices if figure.transport is not None else allowed[figure.initiator]
            used.setdefault(figure.initiator, set()).update(named)
    for node, devices in allowed.items():
        left = tuple(name for name in devices if name not in used.get(node, ()))
        if left:
            found[node] = left
    return found


def _row(pair: Pair) -> tuple[str, ...]:
    ends = (pair.prefill.label, pair.decode.label)
    mark = f" {_NVLINK}" if pair.nvlink else ""
    if pair.broken is not None:
        return (*ends, "failed", "", "", "", "", f"{pair.broken.message}{mark}")
    slowest = pair.slowest
    return (
        *ends,
        _towards(pair, pair.decode.node),
        _towards(pair, pair.prefill.node),
        "" if pair.latency_us is None else f"{pair.latency_us:.0f} µs",
        "?" if pair.link_gbs is None else rate(pair.link_gbs),
        "?" if pair.ratio is None else f"{pair.ratio:.0%}",
        "" if slowest is None else f"{_transport(slowest)}{mark}",
    )


def _transport(figure: Figure) -> str:
    return figure.transport or f"on {', '.join(figure.devices) or '?'}"


def _towards(pair: Pair, node: str) -> str:
    rates = [figure.gbs for figure in pair.figures if figure.source != node]
    return rate(min(rates)) if rates else ""


def document(outcome: Outcome, verdict: Verdict, attempt: str) -> dict[str, Any]:
    """preflight.json: all that was measured, rates in 10^9 bytes/s, and what it means."""
    pairs = [
        {
            "prefill": _end(pair, "prefill"),
            "decode": _end(pair, "decode"),
            "figures": to_json(pair.figures),
            "latency_us": pair.latency_us,
            "link_gbs": pair.link_gbs,
            "slowest_gbs": pair.gbs,
            "ratio": None if pair.ratio is None else round(pair.ratio, 4),
            "kv_over_nvlink": pair.nvlink,
            "error": None if pair.broken is None else to_json(pair.broken),
        }
        for pair in outcome.pairs
    ]
    findings = [*verdict.findings, *([verdict.fatal] if verdict.fatal else [])]
    return {
        "attempt": attempt,
        "seconds": outcome.seconds,
        "starting": outcome.starting,
        "pairs": pairs,
        "unmeasured": outcome.unmeasured,
        "cut_short": outcome.cut_short,
        "unused_devices": unused_devices(outcome),
        "broken": {node: to_json(broken) for node, broken in outcome.broken.items()},
        "findings": [to_json(finding) for finding in findings],
    }


def _end(pair: Pair, role: str) -> dict[str, Any]:
    probe = pair.prefill if role == "prefill" else pair.decode
    return {
        "node": probe.node,
        "replicas": list(probe.replicas),
        "gpu": probe.gpu,
        "env": dict(probe.env),
    }


def event(outcome: Outcome) -> dict[str, Any]:
    """The fields of the `preflight` event. Pairs whose KV goes over NVLink are counted apart."""
    measured = [pair for pair in outcome.pairs if not pair.nvlink]
    whole = [pair for pair in measured if pair.broken is None]
    slowest = min(whole, key=lambda pair: pair.gbs or 0.0, default=None)
    return {
        "pairs": len(measured),
        "failed": len(measured) - len(whole),
        "over_nvlink": len(outcome.pairs) - len(measured),
        "unmeasured": outcome.unmeasured,
        "seconds": outcome.seconds,
        "starting": outcome.starting,
        "slowest": None if slowest is None else _short(slowest, whole),
    }


def _short(pair: Pair, whole: Sequence[Pair]) -> dict[str, Any]:
    figure = pair.slowest
    assert figure is not None
    return {
        "prefill": pair.prefill.label,
        "decode": pair.decode.label,
        "gbs": figure.gbs,
        "ratio": None if pair.ratio is None else round(pair.ratio, 4),
        "transport": figure.transport,
    }
