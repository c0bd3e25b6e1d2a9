"""Between which nodes GPU memory crosses NVLink, and the variables that say so to NCCL and UCX. Pure.

UCX takes any node that has NVLink between nodes for one it can reach over it, whichever rack it is in
(uct_cuda_ipc_iface_is_reachable_v2), so across domains it must be told not to. NCCL compares domains itself,
and gives up where a domain's IMEX does not work (ncclMnnvlCheck).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from ...plan.plan import Plan, ReplicaPlan
from ..discovery.facts import RankFacts
from .settings import Setting

_NOBODY_LOOKED = "nobody looked for its IMEX"


def kv_partners(plan: Plan, replica: ReplicaPlan) -> frozenset[int]:
    """Ranks whose engines send KV blocks to this replica, or get them from it."""
    other = {"prefill": "decode", "decode": "prefill"}.get(replica.role)
    return frozenset(rank for each in plan.replicas if each.role == other for rank in each.nodes)


def settings(
    plan: Plan, facts: RankFacts, replica: ReplicaPlan, ranks: Sequence[RankFacts]
) -> Iterator[Setting]:
    """For one replica's process on one node; nothing where that has no NVLink to other nodes."""
    if facts.nvlink_domain is None and facts.nvlink_trouble is None:
        return
    partners = _others(facts, ranks, kv_partners(plan, replica))
    if partners:
        obstacle = barrier(facts, partners)
        why = f"all nodes it shares KV blocks with are in NVLink domain {facts.nvlink_domain}"
        yield Setting(
            name="UCX_CUDA_IPC_ENABLE_MNNVL",
            value="n" if obstacle else "y",
            why=f"KV blocks must not cross NVLink: {obstacle}" if obstacle else why,
        )
    fellows = _others(facts, ranks, replica.nodes)
    if fellows:
        obstacle = barrier(facts, fellows)
        if obstacle:
            why = f"NVLink does not join its nodes: {obstacle}"
            yield Setting(name="NCCL_MNNVL_ENABLE", value="0", why=why)
        else:
            why = f"all its nodes are in NVLink domain {facts.nvlink_domain}"
            yield Setting(name="NCCL_MNNVL_ENABLE", value="1", why=why)
            yield Setting(name="NCCL_CUMEM_ENABLE", value="1", why="NCCL_MNNVL_ENABLE needs it")


def barrier(facts: RankFacts, others: Sequence[RankFacts]) -> str | None:
    """What keeps memory of these nodes from crossing NVLink; None where nothing does."""
    for entry in (facts, *others):
        if entry.nvlink_trouble is not None:
            return f"the NVLink fabric of {entry.node} has {entry.nvlink_trouble}"
        if entry.nvlink_domain != facts.nvlink_domain:
            here, there = facts.nvlink_domain, entry.nvlink_domain or "none"
            return f"{facts.node} is in NVLink domain {here}, {entry.node} in {there}"
    for entry in (facts, *others):
        trouble = _NOBODY_LOOKED if entry.imex is None else entry.imex.trouble
        if trouble is not None:
            return f"{entry.node}: {trouble}"
    return None


def complaint(plan: Plan, facts: RankFacts, replica: ReplicaPlan, ranks: Sequence[RankFacts]) -> str | None:
    """What is wrong with this node's NVLink to those it works with; None where nothing is.

    The words are the same on all nodes with the same trouble, and what another node lacks is for that one
    to tell. A job that is larger than a domain can't be inside one: that is as asked for.
    """
    if facts.nvlink_trouble is not None:
        return f"NVLink does not reach other nodes: its fabric has {facts.nvlink_trouble}"
    others = _others(facts, ranks, kv_partners(plan, replica) | set(replica.nodes))
    if facts.nvlink_domain is None or not others:
        return None
    trouble = _NOBODY_LOOKED if facts.imex is None else facts.imex.trouble
    if trouble is not None:
        return f"NVLink to other nodes is not used: {trouble}"
    fits = plan.nodes <= plan.site.node.nvlink_domain_nodes
    if fits and any(entry.nvlink_domain not in (facts.nvlink_domain, None) for entry in others):
        return "the job's nodes are in several NVLink domains, so less crosses NVLink than could"
    return None


def _others(facts: RankFacts, ranks: Iterable[RankFacts], wanted: Collection[int]) -> tuple[RankFacts, ...]:
    return tuple(entry for entry in ranks if entry.rank in wanted and entry.rank != facts.rank)
