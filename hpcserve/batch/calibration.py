"""Which layout answers the same rows faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import pools
from .history import Part

_SAME = 0.05
"""Part by which rates differ from run to run, so that a smaller lead says nothing."""


def rate(parts: Sequence[Part]) -> dict[str, Any]:
    """Of one layout. Loading and merging do not count: they are the same for ten rows and for a million."""
    seconds = sum(part.working for part in parts)
    gpu_hours = sum(part.gpus * part.working / 3600 for part in parts)
    rows = sum(part.results for part in parts)
    tokens = sum(part.prompt_tokens + part.output_tokens for part in parts)
    used = pools.together(part.pools for part in parts)
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_second": round(rows / seconds, 3) if seconds else 0.0,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "rows_per_gpu_hour": round(rows / gpu_hours, 1) if gpu_hours else None,
        "advice": pools.advice(used),
    }


def verdict(rates: Mapping[str, Mapping[str, Any]]) -> str:
    """For people: which of the two layouts is faster."""
    fast, slow = sorted(rates, key=lambda name: float(rates[name]["rows_per_second"]), reverse=True)
    if not rates[slow]["rows_per_second"]:
        return f"{fast} is the only one that had results"
    lead = rates[fast]["rows_per_second"] / rates[slow]["rows_per_second"]
    if lead < 1 + _SAME:
        return f"{fast} and {slow} are equally fast on these rows, within {_SAME:.0%}"
    how = "`aggregated: {}`" if fast == "aggregated" else "`prefill: {}` and `decode: {}`"
    return f"{fast} is {lead:.2f} times as fast as {slow} on these rows: write {how} in model.yaml"
