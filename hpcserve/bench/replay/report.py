"""The comparison as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD = (
    "hit %", "hottest", "TTFT p50", "p90", "p99 s", "ITL p50", "p99 ms", "good %", "req/s", "2nd half: hit %",
    "good %",
)  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """Policies with most goodput first, then the bounds on the hit rate."""
    policies = found["policies"]
    width = max(len(name) for name in (*policies, "policy")) + 2
    lines = ["policy".ljust(width) + "  ".join(_HEAD)]
    for name in sorted(policies, key=lambda name: -policies[name]["whole"]["goodput"]):
        cells = _cells(policies[name]["whole"], policies[name]["second_half"])
        padded = [cell.rjust(len(head)) for cell, head in zip(cells, _HEAD, strict=True)]
        lines.append(name.ljust(width) + "  ".join(padded))
    setup, trace = found["setup"], found["trace"]
    lines += [
        "",
        "bounds on hits: "
        + ", ".join(f"{name} {100 * value:.1f} %" for name, value in found["bounds"].items()),
        f"{trace['requests']} requests in {trace['seconds']:.0f} s on {setup['workers']} workers of "
        f"{setup['engine']['blocks']} blocks of {setup['block_tokens']} tokens; good: TTFT up to "
        f"{setup['ttft_goal']:g} s and mean ITL up to {1e3 * setup['itl_goal']:g} ms; "
        "hottest: most uncached tokens of a worker over the mean.",
        "(formula): the peer's published formula, not its program.",
    ]
    return "\n".join(lines) + "\n"


def _cells(whole: Mapping[str, float], half: Mapping[str, float]) -> list[str]:
    return [
        f"{100 * whole['hit_rate']:.1f}",
        f"{whole['hottest']:.2f}",
        f"{whole['ttft_p50']:.2f}",
        f"{whole['ttft_p90']:.1f}",
        f"{whole['ttft_p99']:.1f}",
        f"{1e3 * whole['itl_p50']:.1f}",
        f"{1e3 * whole['itl_p99']:.0f}",
        f"{100 * whole['good']:.1f}",
        f"{whole['goodput']:.2f}",
        f"{100 * half['hit_rate']:.1f}",
        f"{100 * half['good']:.1f}",
    ]
