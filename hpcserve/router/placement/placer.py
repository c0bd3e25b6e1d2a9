"""Chooses the worker, or the pair of workers, for each request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from ..demand import Demand
from .choice import Policy
from .decision import Decision
from .policies import POLICIES
from .residency import NoResidency, Residency
from .view import View

if TYPE_CHECKING:
    from ..workers import Worker

_SESSIONS = 65_536
"""Sessions whose worker is remembered; those unused for longest go."""
_WEIGHT = 0.05


class Placer:
    """One per router process; not shared between threads."""

    def __init__(
        self, policy: str = "kv", residency: Residency | None = None, *, pairs_only: bool = False
    ) -> None:
        """Raises KeyError for a policy that is not in POLICIES. `pairs_only`: decode workers compute no
        prompts."""
        self.policy = policy
        self._policy: Policy = POLICIES[policy]()
        self._residency = residency or NoResidency()
        self._view = View(pairs_only=pairs_only)
        self._sessions: OrderedDict[str, str] = OrderedDict()

    def place(
        self,
        demand: Demand,
        *,
        answering: Sequence[Worker],
        prefill: Sequence[Worker] = (),
        tried: Collection[Worker] = (),
        now: float,
    ) -> Decision | None:
        """Where `demand` goes; None when all were tried.

        `answering` are aggregated or decode workers. With `prefill` workers a pair comes back, or, where
        that is quicker and not ruled out, a decode worker alone that computes the prompt itself. `now` is the
        event loop's time.
        """
        began = perf_counter()
        left = usable(answering, tried, now)
        if not left:
            return None
        view = self._view
        held = self._residency.matches(demand.chain, now=now) if demand.chain else {}
        view.begin(now, held, self._sessions.get(demand.session) if demand.session else None)
        choice = self._policy.choose(demand, left, usable(prefill, tried, now) if prefill else (), view)
        cached = demand.prompt_tokens - choice.uncached
        return Decision(
            answering=choice.answering,
            prefill=choice.prefill,
            policy=self.policy,
            reason=choice.reason,
            uncached_tokens=choice.uncached,
            cached_tokens=cached if cached > 0 else 0,
            shown=choice.shown,
            seconds=perf_counter() - began,
        )

    def placed(self, decision: Decision, demand: Demand, now: float) -> None:
        """It is being sent: the workers that compute or receive it will soon hold its prompt."""
        computes = decision.prefill or decision.answering
        view = self._view
        view.mean_uncached += _WEIGHT * (decision.uncached_tokens - view.mean_uncached)
        self._residency.predict(computes.name, demand, now=now)
        if decision.prefill is not None:
            self._residency.predict(decision.answering.name, demand, now=now)
        if demand.session:
            sessions = self._sessions
            sessions[demand.session] = decision.answering.name
            sessions.move_to_end(demand.session)
            if len(sessions) > _SESSIONS:
                sessions.popitem(last=False)

    def prefill_began(self, worker: Worker, uncached_tokens: int, now: float) -> None:
        """`worker` was sent a prompt of which it must compute `uncached_tokens`."""
        worker.queue.began(uncached_tokens, now)

    def prefill_ended(
        self, worker: Worker, uncached_tokens: int, now: float, *, seconds: float | None = None
    ) -> None:
        """The first byte came, `seconds` after the prompt was sent; None: it failed, or can't be told."""
        worker.queue.ended(uncached_tokens, now, seconds)


def usable(workers: Sequence[Worker], tried: Collection[Worker], now: float) -> Sequence[Worker]:
    """Workers worth a try: not tried yet, and not just failed if there are others."""
    if tried:
        workers = [worker for worker in workers if worker not in tried]
    for worker in workers:
        if worker.breaker.avoid_until > now:
            return [worker for worker in workers if worker.breaker.avoid_until <= now] or workers
    return workers
