"""The policy `kv`: the lowest cost in seconds wins, over workers or pairs of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...http.compiled import compiled
from ..demand import Demand
from .choice import Choice
from .cost import FAR, TWO_LEGS, transfer
from .pool import Pool
from .scores import SHOWN, Scores
from .seen import SeenPairs
from .view import View

if TYPE_CHECKING:
    from ..workers import Worker


class LowestCost:
    """See cost.py for the terms."""

    def __init__(self) -> None:
        module = compiled("router.placement.lowest", "each placement")
        self._choose: Callable[..., Choice | None] | None = None if module is None else module.choose
        self._choose_pair: Callable[..., Choice | None] | None = None
        if module is not None:
            self._choose_pair = module.choose_pair

    def choose(
        self, demand: Demand, answering: Sequence[Worker], prefill: Sequence[Worker], view: View
    ) -> Choice:
        # First the pool that computes prompts: the popularity of what it holds is what counts.
        if prefill:
            if self._choose_pair is not None and type(answering) is list and type(prefill) is list:
                choice = self._choose_pair(demand, answering, prefill, view)
                if choice is not None:
                    return choice
            other = Scores(demand, view.pool(prefill), view, False, False)
            return _pair(Scores(demand, view.pool(answering), view, True, True), other, view)
        if self._choose is not None and type(answering) is list:
            choice = self._choose(demand, answering, view)
            if choice is not None:
                return choice
        pool = view.pool(answering)
        if len(answering) == 1:
            uncached = pool.uncached(demand, view.held)[0][0]
            view.uses(demand, uncached)
            return Choice(answering[0], None, uncached, "only one worker")
        own = Scores(demand, pool, view, True, False)
        best = own.best()
        worker = own.pool.workers[best[0]]
        reason = "session" if worker.name == view.session else ""
        return Choice(worker, None, own.uncached[best[0]], reason, own.seen(best))


def _pair(own: Scores, other: Scores, view: View) -> Choice:
    """The cheapest of: a decode worker alone, or with a prefill worker that computes the prompt for it.

    What a pair costs beyond its two workers depends on the domain alone, so the best few of each pool and the
    best of each domain are all that can win.
    """
    workers, others = own.pool.workers, other.pool.workers
    # As a pair's second, a worker pulls what it doesn't hold: the prefill in `costs` becomes a transfer.
    pulls: list[float] = []
    pulled: list[float] = []
    for worker, base, tokens in zip(workers, own.bases, own.uncached, strict=True):
        pull = transfer(tokens, worker.rates)
        pulls.append(pull)
        pulled.append(base + pull)
    found: list[tuple[float, int, int, float]] = []
    if not view.pairs_only:
        for at in own.best():
            found.append((own.costs[at], at, -1, 0.0))
    firsts = _best_of_each_domain(other.pool, other.costs)
    for at in _best_of_each_domain(own.pool, pulled):
        domain, base = workers[at].domain, own.bases[at] + TWO_LEGS
        for first in firsts:
            pull, there = pulls[at], others[first].domain
            # Where nothing is known of topology, all are near.
            if domain != there and domain is not None and there is not None:
                pull *= FAR
            found.append((base + other.costs[first] + pull, at, first, pull))
    found.sort()
    del found[SHOWN:]
    seconds: list[int] = []
    firsts = []
    transfers: list[float] = []
    for _, at, first, pull in found:
        seconds.append(at)
        firsts.append(first)
        transfers.append(pull)
    seen = SeenPairs(own.seen(seconds), other.seen(firsts), tuple(transfers))
    at, first = seconds[0], firsts[0]
    worker = workers[at]
    reason = "session" if worker.name == view.session else ""
    if first < 0:
        return Choice(worker, None, own.uncached[at], reason or "prefill is quicker on decode", seen)
    return Choice(worker, others[first], other.uncached[first], reason, seen)


def _best_of_each_domain(pool: Pool, costs: list[float]) -> list[int]:
    if len(costs) == 1:
        return [0]
    if len(costs) == len(pool.domains):
        return list(range(len(costs)))
    return [min(places, key=costs.__getitem__) for places in pool.domains]
