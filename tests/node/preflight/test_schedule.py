"""Who is measured with whom: each pair once, nobody twice at a time, everybody soon."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from hpcserve.node.preflight.records import Probe
from hpcserve.node.preflight.schedule import rounds

from .samples import probe


def team(role: str, start: int, nodes: int, each: int) -> list[Probe]:
    return [probe(start + node, role, number=number) for node in range(nodes) for number in range(each)]


LAYOUTS = [
    team("prefill", 0, prefill, own) + team("decode", 100, decode, others)
    for prefill, decode, own, others in product((1, 2, 3, 5), (1, 2, 4, 7), (1, 2), (1, 3))
] + [team("both", 0, nodes, each) for nodes, each in product((2, 3, 4, 5), (1, 2))]


@pytest.mark.parametrize("probes", LAYOUTS, ids=lambda probes: str(len(probes)))
def test_each_pair_once_nobody_twice_at_a_time_and_everybody_in_the_first_rounds(probes: list[Probe]) -> None:
    wanted = {
        (one.name, other.name)
        for one, other in product(probes, probes)
        if one.prefill and other.decode and one.rank != other.rank
    }
    plan = rounds(probes)
    for one in plan:
        ranks = [end.rank for ends in one.pairs for end in ends]
        assert len(ranks) == len(set(ranks)), "a node is in two pairs at once"
    pairs = [(prefill.name, decode.name) for one in plan for prefill, decode in one.pairs]
    assert len(pairs) == len(set(pairs)) and set(pairs) == wanted
    early = {end.name for one in plan if one.first for ends in one.pairs for end in ends}
    assert early == {end for ends in wanted for end in ends}
    assert [one.first for one in plan] == sorted((one.first for one in plan), reverse=True)


def test_a_large_cluster_has_all_its_nodes_in_few_rounds() -> None:
    plan = rounds(team("prefill", 0, 8, 1) + team("decode", 100, 24, 1))
    assert len(plan) == 24
    assert sum(one.first for one in plan) == 3
    assert all(len(one.pairs) == 8 for one in plan)


def railed(role: str, rank: int, rails: int) -> list[Probe]:
    return [
        replace(probe(rank, role), name=f"{rank}.{rail}", gpu=rail, rail=(f"mlx5_{rail}:1",))
        for rail in range(rails)
    ]


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
        (1, 3, [(0, 0), (0, 1), (0, 2)]),
    ],
)
def test_rails_meet_as_the_gpus_of_two_replicas_do(
    own: int, theirs: int, expected: list[tuple[int, int]]
) -> None:
    prefill, decode = (
        [railed(role, rank, count) for rank in ranks]
        for role, ranks, count in (("prefill", (0, 1), own), ("decode", (2, 3), theirs))
    )
    plan = rounds([probe for node in (*prefill, *decode) for probe in node])
    met: dict[tuple[int, int], list[tuple[int | None, int | None]]] = {}
    for one in plan:
        ranks = [end.rank for ends in one.pairs for end in ends]
        assert len(ranks) == len(set(ranks)), "a node is in two pairs at once"
        for a, b in one.pairs:
            met.setdefault((a.rank, b.rank), []).append((a.gpu, b.gpu))
    assert set(met) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert all(sorted(pairs, key=str) == expected for pairs in met.values())
    early = {end.name for one in plan if one.first for ends in one.pairs for end in ends}
    assert len(early) == 2 * (own + theirs)


def test_one_node_alone_has_no_pair() -> None:
    assert rounds([probe(0, "prefill"), probe(0, "decode", number=1)]) == ()
    assert rounds([probe(0, "prefill")]) == ()
