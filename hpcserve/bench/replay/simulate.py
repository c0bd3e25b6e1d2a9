"""Plays a trace through a router and simulated engines: a discrete-event simulation."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .engine import EngineModel, Job, SimulatedEngine
from .trace import TraceRequest


class Router(Protocol):
    """What the simulation tells a routing policy, and asks of it. Times in seconds."""

    def route(self, request: TraceRequest, now: float) -> int:
        """The number of the engine `request` goes to."""
        ...

    def first_token(self, job: Job, now: float) -> None: ...

    def finished(self, job: Job, now: float) -> None: ...

    def cache_changed(self, worker: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """An engine's KV event, after the delay such events have. `stored` continue one prompt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Of one simulation."""

    workers: int = 8
    engine: EngineModel = field(default_factory=EngineModel)
    event_delay: float = 0.05
    """Seconds until the router has heard of a change in a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The outcome: every request, finished, and all inter-token gaps."""

    jobs: list[Job]
    gaps: dict[float, int]
    workers: int


def play(trace: Sequence[TraceRequest], router: Router, setup: Setup) -> Played:
    """Run until the last answer is complete."""
    engines = [SimulatedEngine(setup.engine) for _ in range(setup.workers)]
    jobs: list[Job] = []
    # (time, order, engine or -1 for an event's arrival, wake it was scheduled for, event)
    heap: list[tuple[float, int, int, tuple[int, tuple[int, ...], list[int]] | None]] = []
    order = 0
    position = 0
    while position < len(trace) or heap:
        arrival = trace[position].arrival if position < len(trace) else float("inf")
        if heap and heap[0][0] <= arrival:
            now, _, number, event = heapq.heappop(heap)
            if event is not None:
                router.cache_changed(*event)
                continue
            engine = engines[number]
            if engine.wake != now:
                continue
            change = engine.advance()
            if change.stored or change.removed:
                order += 1
                heapq.heappush(
                    heap, (now + setup.event_delay, order, -1, (number, change.stored, change.removed))
                )
            if change.first_token is not None:
                router.first_token(change.first_token, now)
            for job in change.finished:
                router.finished(job, now)
        else:
            request = trace[position]
            position += 1
            number = router.route(request, arrival)
            engine = engines[number]
            job = Job(request, number)
            jobs.append(job)
            engine.submit(job, arrival)
        if engine.wake != float("inf"):
            order += 1
            heapq.heappush(heap, (engine.wake, order, number, None))
    gaps: dict[float, int] = {}
    for engine in engines:
        for gap, count in engine.gaps.items():
            gaps[gap] = gaps.get(gap, 0) + count
    return Played(jobs=jobs, gaps=gaps, workers=setup.workers)
