"""Who used what: tokens, and GPU-hours shared out.

A run's GPU-hours in an hour are of two kinds. While no request ran they are idle, and nobody's. The rest is
shared out by the work of each key in that hour: a prompt token that was computed counts 1, one from the
prefix cache 0, one that was written `COMPLETION_WEIGHT`, because writing a token keeps a GPU busy several
times longer than computing one of a prompt. An hour whose requests all ended later, and so are counted
there, is shared out as the whole run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .usage_file import HOUR, RunUsage, Used

COMPLETION_WEIGHT = 4.0
By = Literal["user", "key", "model", "run"]


@dataclass(slots=True, kw_only=True)
class Row:
    """What one user, key, model or run used."""

    name: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`."""
    completion_tokens: int = 0
    gpu_hours: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    rows: tuple[Row, ...]
    """Most GPU-hours first, then most tokens."""
    idle_gpu_hours: float
    """While no request ran."""


def report(runs: Mapping[str, RunUsage], *, by: By, since: float | None = None) -> Report:
    """`since` is a Unix time; hours that began before it are left out."""
    rows: dict[str, Row] = {}
    idle = 0.0
    for run, usage in runs.items():
        name = _naming(by, run)
        used = [entry for entry in usage.used.values() if since is None or entry.hour > since - HOUR]
        for entry in used:
            row = rows.setdefault(name(entry), Row(name=name(entry)))
            row.requests += entry.requests
            row.prompt_tokens += entry.prompt
            row.cached_tokens += entry.cached
            row.completion_tokens += entry.completion
        whole = _shares(used, name)
        for time in usage.times.values():
            if since is not None and time.hour <= since - HOUR:
                continue
            shares = _shares((entry for entry in used if entry.hour == time.hour), name) or whole
            busy = min(time.busy, time.up) if shares else 0.0
            idle += time.gpus * (time.up - busy) / HOUR
            for owner, share in shares.items():
                rows[owner].gpu_hours += time.gpus * busy / HOUR * share
    ordered = sorted(
        rows.values(), key=lambda row: (-row.gpu_hours, -row.prompt_tokens - row.completion_tokens, row.name)
    )
    return Report(rows=tuple(ordered), idle_gpu_hours=idle)


def _naming(by: By, run: str) -> Callable[[Used], str]:
    match by:
        case "user":
            return lambda used: used.name or "(without a key)"
        case "key":
            return lambda used: f"{used.key} ({used.name})" if used.key != used.name else _plain(used)
        case "model":
            return lambda used: used.model
        case "run":
            return lambda _: run


def _plain(used: Used) -> str:
    return used.key or "(without a key)"


def _shares(used: Iterable[Used], name: Callable[[Used], str]) -> dict[str, float]:
    """Parts of 1 by owner; {} when nothing was used."""
    work: dict[str, float] = {}
    for entry in used:
        weight = max(entry.prompt - entry.cached, 0) + COMPLETION_WEIGHT * entry.completion
        work[name(entry)] = work.get(name(entry), 0.0) + weight
    total = sum(work.values())
    return {owner: weight / total for owner, weight in work.items()} if total else {}
