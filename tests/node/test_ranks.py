"""A replica's data-parallel ranks: workers of their own that come and go together."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcserve.config.model import ModelSpec
from hpcserve.node.discovery.facts import Roster
from hpcserve.node.head.kv_proof import Proof, Target
from hpcserve.node.head.proving import TRIES, Proving
from hpcserve.node.head.registry import Registry

from .jobs import Job
from .runs import events, make_plan, replica, wait_for
from .test_proving import Scripted, Try, moved, nothing_moved, quick
from .test_registry import beat, names, registry

__all__ = ["quick"]

HEADER = "x-data-parallel-rank"


def ranks(name: str, *nodes: int, size: int, experts: bool = False) -> Any:
    plain = replica(name, *nodes, gpus=tuple(range(size // len(nodes))))
    return replace(plain, tensor_parallel=1, data_parallel=size, expert_parallel=experts)


def with_vllm(seen: Registry) -> Registry:
    """The fake engine has no replica over several nodes."""
    plan = replace(seen.plan, model=replace(seen.plan.model, engine="vllm"))
    assert isinstance(plan.model, ModelSpec)
    return Registry(plan, seen.ranks)


def test_each_rank_is_a_worker_and_all_have_one_api() -> None:
    seen = registry(1, ranks("aggregated-0", 0, size=3))
    seen.heartbeat(beat(0, "aggregated-0", "ready"), 0)
    assert seen.workers() == ()
    assert seen.prove("aggregated-0", 1) == [("worker-in", {"replica": "aggregated-0"})]
    assert [(worker.name, worker.rank, worker.url, dict(worker.headers)) for worker in seen.workers()] == [
        (f"aggregated-0#{rank}", rank, "http://aggregated-0:1", {HEADER: str(rank)}) for rank in range(3)
    ]
    assert seen.describe()[0]["in_rotation"]
    news = seen.suspect("aggregated-0", "it does not answer")
    assert names(news) == ["worker-out"]
    assert seen.workers() == ()


def test_a_workers_name_leads_to_its_replica() -> None:
    seen = registry(1, ranks("aggregated-0", 0, size=2))
    assert seen.replica_of("aggregated-0#1").name == "aggregated-0"
    for name in ("aggregated-0#2", "aggregated-0#x", "aggregated-1#0", "aggregated-1"):
        with pytest.raises(KeyError):
            seen.replica_of(name)


def test_without_experts_one_api_takes_the_requests_for_ranks_on_other_nodes() -> None:
    seen = with_vllm(registry(2, ranks("aggregated-0", 0, 1, size=4)))
    seen.heartbeat(beat(0, "aggregated-0", "ready"), 0)
    seen.prove("aggregated-0", 1)
    assert [(worker.node, worker.headers[HEADER]) for worker in seen.workers()] == [
        (0, "0"), (0, "1"), (0, "2"), (0, "3"),
    ]  # fmt: skip


def test_with_experts_each_node_has_an_api_for_its_own_ranks() -> None:
    plain = registry(2, ranks("aggregated-0", 0, 1, size=4, experts=True))
    seen = with_vllm(
        Registry(plain.plan, tuple(replace(facts, leaf_switch=f"s{facts.rank}") for facts in plain.ranks))
    )
    seen.heartbeat(beat(0, "aggregated-0", "ready"), 0)
    assert seen.ready() == ()
    (one,) = seen.replicas.values()
    assert seen.why_out(one) == "its processes on other nodes are not ready"
    second = beat(1, "aggregated-0", "ready")
    entry = replace_entry(second.replicas[0], url="http://second:1")
    seen.heartbeat(type(second)(rank=1, node="n1", pid=1, replicas=(entry,)), 0)
    seen.prove("aggregated-0", 1)
    assert [(w.name, w.url, w.headers[HEADER], w.domain) for w in seen.workers()] == [
        ("aggregated-0#0", "http://aggregated-0:1", "0", "s0"),
        ("aggregated-0#1", "http://aggregated-0:1", "1", "s0"),
        ("aggregated-0#2", "http://second:1", "0", "s1"),
        ("aggregated-0#3", "http://second:1", "1", "s1"),
    ]
    # One dead process of the group is the end of all.
    seen.heartbeat(beat(1, "aggregated-0", "backoff", failure={"message": "boom"}), 1)
    assert seen.workers() == ()
    # Its next start is one with the head's next.
    seen.heartbeat(beat(0, "aggregated-0", "ready", generation=2), 2)
    seen.heartbeat(beat(1, "aggregated-0", "ready", generation=1), 2)
    assert seen.ready() == ()


def replace_entry(entry: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(entry, **changes)


class Bench:
    """One prefill replica, and one decode replica of two ranks."""

    def __init__(self, *results: Try) -> None:
        self.seen = registry(2, replica("prefill-0", 0), ranks("decode-0", 1, size=2))
        self.seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
        self.seen.heartbeat(beat(1, "decode-0", "ready"), 0)
        self.prover = Scripted(*results)
        self.proving = Proving(
            plan=make_plan(2),
            roster=Roster(transport="tcp", attempt="a", seconds=0.0, ranks=self.seen.ranks),
            registry=self.seen,
            prover=self.prover,  # type: ignore[arg-type]
            tell=lambda news: None,
        )


async def test_a_replica_is_proven_when_each_of_its_ranks_is() -> None:
    bench = Bench(moved)
    assert await bench.proving.round() == []
    assert sorted(bench.prover.asked) == [("prefill-0", "decode-0#0"), ("prefill-0", "decode-0#1")]
    assert [worker.name for worker in bench.seen.workers()] == ["prefill-0", "decode-0#0", "decode-0#1"]


async def test_a_rank_without_kv_keeps_its_replica_out() -> None:
    async def only_the_first(prefill: Target, decode: Target) -> Proof:
        return await (moved if decode.rank == 0 else nothing_moved)(prefill, decode)

    bench = Bench(only_the_first)
    (error,) = await bench.proving.round()
    assert "no KV cache passes" in error.message
    # Once more with a partner that is known to be good.
    assert bench.prover.asked.count(("prefill-0", "decode-0#1")) == 2 * TRIES
    assert [worker.name for worker in bench.seen.workers()] == ["prefill-0"]


def test_a_job_whose_decode_replica_has_two_ranks(tmp_path: Path) -> None:
    plan = make_plan(2, replica("prefill-0", 0), ranks("decode-0", 1, size=2))
    with Job(tmp_path / "run", plan) as job:
        job.wait("ready")
        proven = {event["decode"] for event in events(job.run, "kv-path") if event["ok"]}
        assert proven == {"decode-0#0", "decode-0#1"}
        assert all(job.complete(f"{number} is asked")[0] == 200 for number in range(4))
        _, status = job.ask("GET", "/status")
        assert [(worker["name"], worker["replica"]) for worker in status["workers"]] == [
            ("prefill-0", "prefill-0"), ("decode-0#0", "decode-0"), ("decode-0#1", "decode-0"),
        ]  # fmt: skip
        os.kill(job.engine_pid("decode-0"), signal.SIGKILL)
        job.wait("worker-out", replica="decode-0")
        wait_for(lambda: job.replica("decode-0")["in_rotation"], "decode-0's return")
        assert job.complete("and once more")[0] == 200
