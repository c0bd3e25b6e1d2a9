"""What a policy made of a trace, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Job
from .simulate import Played

TTFT_GOAL = 2.0
ITL_GOAL = 0.025
"""Seconds: what Dynamo's and srt-slurm's replays of this trace count as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Times in seconds."""

    hit_rate: float
    """Prompt blocks that were in the cache of the engine asked, of all."""
    hottest: float
    """Uncached prompt tokens of the engine with most of them, over the mean."""
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    """Over single gaps."""
    good: float
    """Requests with TTFT and mean ITL within the goals, of all."""
    goodput: float
    """Those, a second."""
    uncached_tokens: int


def measure(played: Played, *, after: float = 0.0) -> Outcome:
    """Over the requests that arrived at `after` or later; gaps are always those of the whole run."""
    jobs = [job for job in played.jobs if job.request.arrival >= after]
    work = [0] * played.workers
    for job in jobs:
        work[job.worker] += job.uncached
    times = sorted(job.ttft for job in jobs)
    good = sum(job.ttft <= TTFT_GOAL and job.itl <= ITL_GOAL for job in jobs)
    span = max(job.finished for job in jobs) - min(job.request.arrival for job in jobs)
    return Outcome(
        hit_rate=hit_rate(jobs),
        hottest=max(work) * played.workers / max(sum(work), 1),
        ttft_p50=quantile(times, 0.5),
        ttft_p90=quantile(times, 0.9),
        ttft_p99=quantile(times, 0.99),
        itl_p50=_weighted(played.gaps, 0.5),
        itl_p99=_weighted(played.gaps, 0.99),
        good=good / len(jobs),
        goodput=good / span if span else 0.0,
        uncached_tokens=sum(work),
    )


def hit_rate(jobs: Sequence[Job]) -> float:
    blocks = sum(len(job.request.blocks) for job in jobs)
    return sum(job.blocks_hit for job in jobs) / blocks if blocks else 0.0


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of sorted values, the nearest rank."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _weighted(counts: dict[float, int], part: float) -> float:
    left = part * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0.0
