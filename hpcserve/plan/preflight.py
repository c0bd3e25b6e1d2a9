"""Does a job measure the way of its KV blocks before it loads models? Pure."""

from __future__ import annotations

from .abilities import ABILITIES
from .plan import Plan

PREFLIGHT_TIMEOUT = 480
"""Seconds after which rank 0 is done, whatever does not answer."""
PREFLIGHT_WAIT = PREFLIGHT_TIMEOUT + 120
"""Seconds that the step goes on after its first task has ended: rank 0 may have begun so much later."""


def has_preflight(plan: Plan) -> bool:
    """Where NIXL moves KV blocks between nodes, unless model.yaml says `kv_preflight: false`.

    On site `local` all nodes are one machine, and there is no link to measure.
    """
    prefill = {rank for replica in plan.with_role("prefill") for rank in replica.nodes}
    decode = {rank for replica in plan.with_role("decode") for rank in replica.nodes}
    apart = any(one != other for one in prefill for other in decode)
    nixl = ABILITIES[plan.model.engine].nixl
    return plan.model.kv_preflight and plan.site.scheduler != "local" and nixl and apart
