"""Heartbeats in, worker table and events out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpcserve.node.discovery.facts import ModelFact, RankFacts
from hpcserve.node.head.head import _TICK
from hpcserve.node.head.kv_proof import Target, pairs_to_prove
from hpcserve.node.head.registry import LOST_AFTER, Entry, Heartbeat, Registry

from .runs import make_plan, replica


def registry(nodes: int = 2, *replicas: Any) -> Registry:
    ranks = tuple(
        RankFacts(
            rank=rank, node=f"n{rank}", address="a", machine_id="m", cpus=(0,), model=ModelFact(path="m")
        )
        for rank in range(nodes)
    )
    return Registry(make_plan(nodes, *replicas), ranks)


def beat(rank: int, name: str, state: str, generation: int = 1, **more: Any) -> Heartbeat:
    url = f"http://{name}:{generation}" if state in ("ready", "draining") else None
    entry = Entry(name=name, state=state, generation=generation, url=url, **more)
    return Heartbeat(rank=rank, node=f"n{rank}", pid=1, replicas=(entry,))


def names(news: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [name for name, _ in news]


def test_a_ready_engine_takes_requests_only_after_its_proof() -> None:
    seen = registry()
    assert names(seen.heartbeat(beat(0, "prefill-0", "starting"), 0)) == ["engine-starting"]
    news = seen.heartbeat(beat(0, "prefill-0", "loading", progress="weights 1/8"), 1)
    assert news == [("engine-loading", {"replica": "prefill-0", "progress": "weights 1/8"})]
    assert seen.heartbeat(beat(0, "prefill-0", "loading", progress="weights 1/8"), 1) == []
    assert names(seen.heartbeat(beat(0, "prefill-0", "ready", ready_seconds=2.0), 2)) == ["engine-ready"]
    assert seen.workers() == ()
    assert [entry.name for entry in seen.unproven(2)] == ["prefill-0"]
    assert seen.prove("prefill-0", 1) == [("worker-in", {"replica": "prefill-0"})]
    assert [worker.url for worker in seen.workers()] == ["http://prefill-0:1"]
    assert seen.unproven(2) == ()


def test_the_router_is_told_the_ports_of_each_start() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready", ports={"http": 1, "bootstrap": 8998}), 0)
    seen.prove("prefill-0", 1)
    assert [dict(worker.ports) for worker in seen.workers()] == [{"http": 1, "bootstrap": 8998}]


def test_the_router_is_told_where_a_worker_is() -> None:
    plain = registry().ranks
    ranks = (replace(plain[0], nvlink_domain="rack.1", leaf_switch="s1"), replace(plain[1], leaf_switch="s1"))
    seen = Registry(make_plan(2), ranks)
    for rank, name in enumerate(("prefill-0", "decode-0")):
        seen.heartbeat(beat(rank, name, "ready"), 0)
        seen.prove(name, 1)
    assert {worker.name: worker.domain for worker in seen.workers()} == {
        "prefill-0": "rack.1",
        "decode-0": "s1",
    }


def test_a_proof_of_an_earlier_start_counts_for_nothing() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready", generation=2), 0)
    assert seen.prove("prefill-0", 1) == []
    assert seen.workers() == ()


def test_a_crash_takes_the_worker_out_and_a_restart_must_be_proven_again() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    seen.prove("prefill-0", 1)
    failure = {"cause": "unknown", "message": "killed by SIGKILL", "hint": "h"}
    news = dict(seen.heartbeat(beat(0, "prefill-0", "backoff", failure=failure, restart_in=1.0), 1))
    assert news["engine-died"]["restart_in"] == 1.0
    assert news["worker-out"]["reason"] == "killed by SIGKILL"
    seen.heartbeat(beat(0, "prefill-0", "ready", generation=2), 2)
    assert seen.workers() == ()
    assert names(seen.prove("prefill-0", 2)) == ["worker-in"]


def test_a_restart_between_two_heartbeats_is_noticed() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    seen.prove("prefill-0", 1)
    news = seen.heartbeat(beat(0, "prefill-0", "ready", generation=2), 1)
    assert names(news) == ["engine-starting", "engine-ready", "worker-out"]


def test_a_silent_agent_is_out_within_five_seconds_of_its_last_sign() -> None:
    # What the head waits, and the two looks around it; a beat may have come just before the end.
    assert LOST_AFTER + 2 * _TICK < 5


def test_a_silent_agent_loses_its_workers_after_three_seconds_and_may_come_back() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    seen.heartbeat(beat(1, "decode-0", "ready"), 0)
    seen.prove("prefill-0", 1)
    seen.prove("decode-0", 1)
    assert seen.expire(LOST_AFTER) == []
    seen.heartbeat(beat(0, "prefill-0", "ready"), LOST_AFTER)
    news = seen.expire(LOST_AFTER + 0.1)
    assert names(news) == ["warning", "worker-out"]
    assert news[1][1] == {"replica": "decode-0", "reason": "no heartbeat from n1 for 3 s"}
    assert not seen.usable()
    assert names(seen.heartbeat(beat(1, "decode-0", "ready"), 9)) == ["warning"]
    assert names(seen.prove("decode-0", 1)) == ["worker-in"]


def test_a_suspect_worker_is_out_until_proven_again() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    seen.prove("prefill-0", 1)
    assert names(seen.suspect("prefill-0", "connection refused")) == ["worker-out"]
    assert [entry.name for entry in seen.unproven(1)] == ["prefill-0"]


def test_a_failed_proof_waits_before_the_next_try() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    seen.keep_out("prefill-0", "no KV", retry_at=30)
    assert seen.unproven(29) == ()
    assert [entry.name for entry in seen.unproven(30)] == ["prefill-0"]
    assert seen.describe()[0]["reason"] == "no KV"


def test_unknown_ranks_and_replicas_are_refused() -> None:
    seen = registry()
    with pytest.raises(KeyError):
        seen.heartbeat(beat(7, "prefill-0", "ready"), 0)
    with pytest.raises(KeyError):
        seen.heartbeat(beat(0, "prefill-9", "ready"), 0)


def test_only_the_head_process_of_a_replica_speaks_for_it() -> None:
    seen = registry(2, replica("aggregated-0", 0, 1))
    seen.heartbeat(beat(1, "aggregated-0", "loading"), 0)
    assert seen.replicas["aggregated-0"].entry is None
    seen.heartbeat(beat(0, "aggregated-0", "starting", ports={"master": 29501}), 0)
    head = {"generation": 1, "ports": {"master": 29501}}
    assert seen.leaders(1) == {"aggregated-0": {**head, "ready": False}}
    assert seen.leaders(0) == {}
    seen.heartbeat(beat(0, "aggregated-0", "ready", ports={"master": 29501}), 0)
    assert seen.leaders(1) == {"aggregated-0": {**head, "ready": True}}


def test_nothing_is_left_to_hope_for_when_all_decode_is_lost_or_given_up() -> None:
    seen = registry()
    seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
    assert not seen.hopeless()
    seen.heartbeat(beat(1, "decode-0", "failed", failure={"message": "bad flag"}), 0)
    assert seen.hopeless()


# Which pairs prove the KV path


def targets(role: str, *places: str) -> list[Target]:
    return [
        Target(name=f"{role}-{index}", replica=f"{role}-{index}", url="u", generation=1, machine=place)
        for index, place in enumerate(places)
    ]


def test_every_replica_is_in_a_pair_and_both_classes_of_pairs_are_tried() -> None:
    prefills, decodes = targets("prefill", "a", "b"), targets("decode", "a", "b", "c")
    everyone = {target.name for target in (*prefills, *decodes)}
    pairs = pairs_to_prove(prefills, decodes, everyone)
    assert {target.name for pair in pairs for target in pair} == everyone
    assert {prefill.machine == decode.machine for prefill, decode in pairs} == {True, False}


def test_one_restarted_replica_costs_one_pair() -> None:
    prefills, decodes = targets("prefill", "a", "b"), targets("decode", "c", "d", "e")
    for name in ("prefill-1", "decode-2"):
        [pair] = pairs_to_prove(prefills, decodes, {name})
        assert name in {target.name for target in pair}


def test_without_a_partner_there_is_no_pair() -> None:
    assert pairs_to_prove([], targets("decode", "a"), {"decode-0"}) == []
