"""Adds each request up: into the metrics, the key's usage, and what is learned for the next ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from .admission.admission import Ticket
from .call import Call
from .demand import Demand
from .metrics import Child, Metrics
from .placement.decision import Decision
from .prompt import Prompts
from .usage import Usage

_KEYS = 1000
"""Keys with figures of their own."""


class _Key:
    """The figures of one key, looked up once."""

    __slots__ = ("cached", "completion", "prompt", "requests")

    def __init__(self, metrics: Metrics, name: str) -> None:
        key = ("key", name)
        self.requests = metrics.key_requests.child(key)
        self.prompt = metrics.key_tokens.child(key, ("kind", "prompt"))
        self.cached = metrics.key_tokens.child(key, ("kind", "cached"))
        self.completion = metrics.key_tokens.child(key, ("kind", "completion"))


class Account:
    """One per router process."""

    def __init__(self, metrics: Metrics, prompts: Prompts) -> None:
        self._metrics = metrics
        self._prompts = prompts
        self._requests: dict[tuple[str, int], Child] = {}
        self._keys: dict[str, _Key] = {}
        self._prompt = metrics.prompt_tokens.child()
        self._cached = metrics.cached_tokens.child()
        self._reported = metrics.reported_tokens.child()
        self._predicted = metrics.predicted_tokens.child()
        self._generated = metrics.generation_tokens.child()

    def answered(self, route: str, status: int) -> None:
        """A request has ended, in whatever way; 499 where the client left before there was a status."""
        self.answers(route, status).value += 1

    def answers(self, route: str, status: int) -> Child:
        """The figure that `answered()` counts, to keep."""
        child = self._requests.get((route, status))
        if child is None:
            child = self._metrics.requests.child(("route", route), ("status", str(status)))
            self._requests[route, status] = child
        return child

    def let_in(self, ticket: Ticket, name: str) -> None:
        """A request of the key called `name` was let in."""
        self._metrics.queue.observe(ticket.waited)
        self.key(name).requests.value += 1

    def served(
        self,
        call: Call,
        demand: Demand,
        gap: float | None,
        ticket: Ticket,
        told: Mapping[str, Any] | None,
    ) -> None:
        """An answer is whole; `gap` is the mean time between its events, `told` the engine's `usage`."""
        exchange = call.exchange
        if exchange.status == 200 and exchange.finished:
            self._metrics.latency.observe(asyncio.get_running_loop().time() - call.arrived)
        usage = Usage.of(told)
        if usage is not None:
            ticket.used(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens or 0,
                completion_tokens=usage.completion_tokens,
            )
        self.counted(call.user, demand, gap, usage, call.decisions[-1] if call.decisions else None)

    def counted(
        self, user: str, demand: Demand, gap: float | None, usage: Usage | None, decision: Decision | None
    ) -> None:
        """What the engine counted of an answer to the key `user`; `decision` was the last placement."""
        metrics = self._metrics
        if gap is not None:
            metrics.tpot.observe(gap)
            # Engines count the tokens; where they don't, one event is one token.
            metrics.itl.observe(gap, max(usage.completion_tokens - 1, 1) if usage is not None else 1)
        if usage is None:
            return
        cached = usage.cached_tokens or 0
        self._prompts.learn(demand, usage.prompt_tokens, usage.completion_tokens)
        self._prompt.value += usage.prompt_tokens
        if usage.cached_tokens is not None:
            self._reported.value += usage.prompt_tokens
        self._cached.value += cached
        self._generated.value += usage.completion_tokens
        if decision is not None:
            self._predicted.value += min(decision.cached_tokens, usage.prompt_tokens)
        key = self.key(user)
        key.prompt.value += usage.prompt_tokens
        key.cached.value += cached
        key.completion.value += usage.completion_tokens

    def placed(self, call: Call) -> None:
        """A request has ended: what its placements took."""
        for decision in call.decisions:
            self._metrics.decision.observe(decision.seconds)

    def key(self, name: str) -> _Key:
        """Its figures, to keep."""
        key = self._keys.get(name)
        if key is None:
            if len(self._keys) >= _KEYS:
                name = "other"
            key = self._keys.setdefault(name, _Key(self._metrics, name))
        return key
