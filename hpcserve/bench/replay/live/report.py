"""The live replay as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..outcome import ITL_GOAL, TTFT_GOAL

_HEAD = (
    "hit %", "hottest", "TTFT p50", "p90", "p99 s", "ITL p50", "p99 ms", "good %", "errors",
    "router ms", "CPU %", "busy", "simulated: hit %", "hottest", "good %",
)  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """Routers in the order they were played."""
    routers = found["routers"]
    width = max(len(name) for name in (*routers, "router")) + 2
    lines = ["router".ljust(width) + "  ".join(_HEAD)]
    for name, figures in routers.items():
        if figures is None:
            lines.append(name.ljust(width) + "not installed")
        elif "failed" in figures:
            lines.append(name.ljust(width) + figures["failed"])
        else:
            cells = _cells(figures, found["simulated"].get(name))
            padded = [cell.rjust(len(head)) for cell, head in zip(cells, _HEAD, strict=True)]
            lines.append(name.ljust(width) + "  ".join(padded))
    setup, trace = found["setup"], found["trace"]
    scale = setup["scale"]
    lines += [
        "",
        "bounds on hits: "
        + ", ".join(f"{name} {100 * value:.1f} %" for name, value in found["bounds"].items()),
        f"{trace['requests']} requests of {trace['seconds']:.0f} s on {setup['workers']} engines of "
        f"{setup['engine']['blocks']} blocks, played {scale['pace']:g} times as fast with prompts of "
        f"1/{scale['prompt']} and answers of 1/{scale['answer']} of their tokens.",
        f"Times are the trace's: live ones times {scale['pace']:g}, and of a token over {scale['answer']}. "
        f"Good: TTFT up to {TTFT_GOAL:g} s and mean ITL up to {1e3 * ITL_GOAL:g} ms.",
        "hit: as the engines counted, of prompt tokens; hottest: most uncached tokens of an engine over the "
        "mean;",
        "router ms: its CPU time for a request; CPU: of this machine's, by this run; busy: by anybody.",
    ]
    return "\n".join(lines) + "\n"


def _cells(figures: Mapping[str, Any], simulated: Mapping[str, Any] | None) -> list[str]:
    expected = ["", "", ""]
    if simulated is not None:
        expected = [
            f"{100 * simulated['hit_rate']:.1f}",
            f"{simulated['hottest']:.2f}",
            f"{100 * simulated['good']:.1f}",
        ]
    return [
        f"{100 * figures['hit_rate']:.1f}",
        f"{figures['hottest']:.2f}",
        f"{figures['ttft_p50']:.2f}",
        f"{figures['ttft_p90']:.1f}",
        f"{figures['ttft_p99']:.1f}",
        f"{1e3 * figures['itl_p50']:.1f}",
        f"{1e3 * figures['itl_p99']:.0f}",
        f"{100 * figures['good']:.1f}",
        str(figures["errors"]),
        f"{1e3 * figures['router_cpu']:.1f}",
        f"{100 * figures['own_share']:.0f}",
        f"{100 * figures['machine_busy']:.0f}",
        *expected,
    ]
