"""The two ways to use the nodes of a plan, for whoever wants to measure which is better."""

from __future__ import annotations

from dataclasses import replace

from ..config.model import Role, RoleSpec
from .plan import Plan

Pools = dict[Role, RoleSpec]


def layouts(plan: Plan) -> dict[str, Pools | None]:
    """`disaggregated` and `aggregated`: the plan's own one as None, the other as the pools that it takes.

    The other one's engines are as large: aggregated ones like those of `decode`, and both of a pair like
    aggregated ones. How many nodes each pool gets is left to the planner.
    """
    model = plan.model
    if model.aggregated is not None:
        pool = replace(model.aggregated, nodes=None, replicas=None)
        return {"disaggregated": {"prefill": pool, "decode": pool}, "aggregated": None}
    assert model.decode is not None
    pool = replace(model.decode, nodes=None, replicas=None)
    return {"disaggregated": None, "aggregated": {"aggregated": pool}}
