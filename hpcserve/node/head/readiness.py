"""From agents to READY: what a launch waits for, how long, and what it says when that does not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...errors import EngineError, JobError
from ...plan.plan import Plan
from .registry import Registry, Replica

AGENT_WAIT = 120.0
"""Seconds for every agent to report; the rendezvous has just shown that all nodes are there."""


class Readiness:
    """Waits on the registry; each wait ends with an error that names who is missing and why."""

    def __init__(self, plan: Plan, registry: Registry, changed: Callable[[], asyncio.Event]) -> None:
        self._plan = plan
        self._registry = registry
        self._changed = changed

    async def agents(self) -> None:
        """Raises JobError with the names of the agents that did not report."""
        if await self._until(lambda: not self._registry.silent(), AGENT_WAIT):
            return
        absent = ", ".join(f"{agent.rank} ({agent.node})" for agent in self._registry.silent()[:8])
        raise JobError(
            f"no word from the agents of ranks {absent} within {AGENT_WAIT:g} s",
            hint="logs/agent-RANK.log says how far they got; a firewall between nodes looks like this, too",
        )

    async def engines(self, spent: float) -> None:
        """Until all engines answer. Raises EngineError for one that is given up or not ready in time.

        `spent`: seconds of ready_timeout that went into staging the model.
        """
        if await self._until(self._settled, self._plan.ready_timeout - spent):
            return
        late = [replica for replica in self._registry.replicas.values() if not self._is_ready(replica)]
        staging = f", {spent:.0f} s of which went into staging the model" if spent >= 1 else ""
        told = "; ".join(f"{replica.name}: {self._doing(replica)}" for replica in late[:4])
        raise EngineError(
            f"{len(late)} of {len(self._registry.replicas)} replicas were not ready"
            f" after {self._plan.ready_timeout} s{staging}: {told}",
            hint="raise `ready_timeout` in model.yaml if they were still loading;"
            " their logs are logs/REPLICA.NODE.log",
        )

    def _settled(self) -> bool:
        """All ready, apart from those on lost nodes. Raises what makes waiting longer pointless."""
        for replica in self._registry.replicas.values():
            entry = replica.entry
            if entry is not None and entry.state == "failed" and entry.failure is not None:
                raise EngineError(
                    f"{replica.name} on {self._node(replica)} failed: {entry.failure.get('message')}",
                    hint=entry.failure.get("hint"),
                )
        self._check_lost()
        return all(
            self._is_ready(replica) or self._registry.lost(replica)
            for replica in self._registry.replicas.values()
        )

    def _check_lost(self) -> None:
        lost = [agent for agent in self._registry.agents.values() if agent.lost]
        roles = {
            replica.plan.role
            for replica in self._registry.replicas.values()
            if not self._registry.lost(replica)
        }
        needed = {"prefill", "decode"} if self._plan.disaggregated else {"aggregated"}
        if lost and not needed <= roles:
            raise JobError(
                f"lost {', '.join(agent.node for agent in lost)} before READY, and no"
                f" {' and no '.join(sorted(needed - roles))} replica is left",
                hint="launch again; `sacct` tells whether the node failed",
            )

    def _is_ready(self, replica: Replica) -> bool:
        return self._registry.all_are(replica, "ready")

    def _node(self, replica: Replica) -> str:
        return self._registry.agents[replica.rank].node

    def _doing(self, replica: Replica) -> str:
        entry = replica.entry
        if entry is None:
            return "not started"
        if entry.failure is not None:
            return entry.failure.get("message", entry.state)
        return entry.progress or entry.state

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            changed = self._changed()
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await changed.wait()
            except TimeoutError:
                continue
        return True
