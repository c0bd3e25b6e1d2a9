"""The costs of one request on every worker of a pool."""

from __future__ import annotations

from collections.abc import Sequence

from ..demand import Demand
from . import cost
from .cost import PER_STREAM
from .pool import Pool
from .seen import Reading, Seen
from .view import View

SHOWN = 3
"""Candidates of a decision that are kept to explain it."""


class Scores:
    """See cost.py for the terms; `seen.py` takes a sum apart again."""

    __slots__ = (
        "_copied", "_demand", "_least", "_loading", "_session", "_stall", "_view", "bases", "costs", "pool",
        "uncached",
    )  # fmt: skip

    def __init__(self, demand: Demand, pool: Pool, view: View, writes: bool, paired: bool) -> None:
        """`writes`: the answer is written there; `paired`: the prompt may be computed elsewhere."""
        self._demand = demand
        self._view = view
        self.pool = pool
        uncached, slower = pool.uncached(demand, view.held)
        self.uncached = uncached
        self._least = least = min(uncached)
        uses = view.uses(demand, least)
        self._copied = copied = cost.copied(uses) if uses else 0.0
        behind = pool.behind
        # In one pass over all what Seen.terms() says, without the time of a call for each worker.
        saved = copied * (behind - 1.0)
        stall = step = 0.0
        self._stall = -1.0
        if writes:
            self._stall = cost.stall_factor(pool.prefilling, behind)
            stall = demand.output_tokens * self._stall
            step = demand.output_tokens * cost.STEP_PER_STREAM
        self.bases: list[float] = []
        """Cost of each worker but for prefill, where it may be computed elsewhere; else empty."""
        self.costs: list[float] = []
        bases, costs = self.bases, self.costs
        for worker, read, tokens in zip(pool.workers, pool.reads, uncached, strict=True):
            _, streams, _, base, slope = read
            if writes:
                base += stall / (worker.rates.decode * (behind + PER_STREAM * streams)) + step * streams
            if saved and tokens > least:
                base -= saved * (tokens - least) / worker.rates.prefill
            if paired:
                bases.append(base)
            costs.append(base + tokens * slope)
        self._loading: dict[int, float] | None = None
        if slower:
            self._loading = {}
            for at, match in slower.items():
                host, disk = match.cpu * demand.chunk_tokens, match.storage * demand.chunk_tokens
                seconds = self._loading[at] = cost.loading(host, disk, pool.workers[at].rates)
                costs[at] += seconds
                if paired:
                    bases[at] += seconds
        self._session = -1
        if view.session:
            self._session = at = pool.index.get(view.session, -1)
            if at >= 0:
                credit = cost.SESSION * uncached[at] / pool.workers[at].rates.prefill
                costs[at] -= credit
                if paired:
                    bases[at] -= credit

    def best(self) -> list[int]:
        """The few cheapest, best first. Their loads are read again where loads may be old."""
        best = lowest(self.costs)
        if self.pool.partly_read:
            for _ in range(SHOWN):
                if not self._read_again(best[0]):
                    break
                best = lowest(self.costs)
        return best

    def _read_again(self, at: int) -> bool:
        """True when it costs more than was believed."""
        before = self._read_cost(at)
        self._view.read(self.pool, at)
        more = self._read_cost(at) - before
        self.costs[at] += more
        if self.bases:
            self.bases[at] += more
        return more > 1e-9

    def _read_cost(self, at: int) -> float:
        _, _, _, fixed, slope = self.pool.reads[at]
        return fixed + self.uncached[at] * slope

    def seen(self, places: Sequence[int]) -> Seen:
        """What explains the costs in these places; below zero: a pair without a worker of this pool."""
        demand, pool, loading = self._demand, self.pool, self._loading
        readings: list[Reading | None] = []
        for at in places:
            if at < 0:
                readings.append(None)
                continue
            worker = pool.workers[at]
            rates = worker.rates
            readings.append(
                Reading(
                    worker.name, pool.reads[at], self.uncached[at], rates.prefill, rates.decode,
                    -1.0 if loading is None else loading.get(at, -1.0), at == self._session,
                )
            )  # fmt: skip
        return Seen(
            demand.prompt_tokens, demand.output_tokens, pool.behind, self._stall, self._copied, self._least,
            tuple(readings),
        )  # fmt: skip


def lowest(costs: list[float]) -> list[int]:
    """Places of the SHOWN lowest, lowest first; of equals the first comes first."""
    size = len(costs)
    if size == 1:
        return [0]
    if size == 2:
        return [0, 1] if costs[0] <= costs[1] else [1, 0]
    best = sorted(range(SHOWN), key=costs.__getitem__)
    last = costs[best[-1]]
    for at in range(SHOWN, size):
        seconds = costs[at]
        if seconds < last:
            best.pop()
            place = SHOWN - 1
            while place and seconds < costs[best[place - 1]]:
                place -= 1
            best.insert(place, at)
            last = costs[best[-1]]
    return best
