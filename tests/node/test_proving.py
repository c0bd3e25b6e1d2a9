"""Proofs that fail, hang, or lose their engine on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from hpcserve.errors import KVPathError
from hpcserve.node.discovery.facts import Roster
from hpcserve.node.head import proving as module
from hpcserve.node.head.kv_proof import Proof, Target
from hpcserve.node.head.proving import TRIES, Proving
from hpcserve.node.head.registry import News, Registry

from .runs import make_plan
from .test_registry import beat, registry

Try = Callable[[Target, Target], Awaitable[Proof]]


class Scripted:
    """Answers with one result after the other."""

    def __init__(self, *results: Try) -> None:
        self.results = list(results)
        self.asked: list[tuple[str, str]] = []

    async def pair(self, prefill: Target, decode: Target) -> Proof:
        self.asked.append((prefill.name, decode.name))
        return await self.results[min(len(self.asked), len(self.results)) - 1](prefill, decode)

    async def alone(self, target: Target) -> Proof:
        raise AssertionError("not here")


async def moved(*_: Target) -> Proof:
    return Proof(seconds=0.1, bytes=100.0)


async def nothing_moved(*_: Target) -> Proof:
    return Proof(seconds=0.1, error=KVPathError("no KV cache passes", hint="look"))


class Bench:
    def __init__(self, prover: Scripted, seen: Registry | None = None) -> None:
        self.seen = seen or registry(2)
        self.news: list[News] = []
        self.seen.heartbeat(beat(0, "prefill-0", "ready"), 0)
        self.seen.heartbeat(beat(1, "decode-0", "ready"), 0)
        plan = make_plan(len(self.seen.ranks))
        roster = Roster(transport="tcp", attempt="a", seconds=0.0, ranks=self.seen.ranks)
        self.proving = Proving(
            plan=plan,
            roster=roster,
            registry=self.seen,
            prover=prover,  # type: ignore[arg-type]
            tell=self.tell,
        )

    def tell(self, news: Sequence[News]) -> None:
        self.news += news

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.news if event == name]

    def in_rotation(self) -> list[str]:
        return [worker.name for worker in self.seen.workers()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    monkeypatch.setattr(module, "_LOOK", 0.01)


async def test_one_try_that_moved_nothing_is_shown_and_tried_again() -> None:
    bench = Bench(Scripted(nothing_moved, moved))
    assert await bench.proving.round() == []
    assert [path["ok"] for path in bench.events("kv-path")] == [False, True]
    assert bench.events("kv-path")[0]["error"] == "no KV cache passes"
    [warning] = bench.events("warning")
    assert warning == {"message": "no KV cache passes; it is tried again", "hint": "look"}
    assert bench.in_rotation() == ["prefill-0", "decode-0"]


async def test_a_path_that_never_moves_bytes_is_broken_and_tried_again_later() -> None:
    prover = Scripted(nothing_moved)
    bench = Bench(prover)
    errors = await bench.proving.round()
    assert [error.message for error in errors] == ["no KV cache passes"] * 2
    assert [path["ok"] for path in bench.events("kv-path")] == [False] * TRIES
    assert bench.in_rotation() == []
    assert {entry["reason"] for entry in bench.seen.describe()} == {"no KV cache passes"}
    assert await bench.proving.round() == []
    assert len(prover.asked) == TRIES


async def test_a_broken_decode_engine_does_not_take_its_partner_along() -> None:
    seen = registry(4)
    seen.heartbeat(beat(2, "prefill-1", "ready"), 0)
    seen.heartbeat(beat(3, "decode-1", "ready"), 0)

    async def broken_decode(_: Target, decode: Target) -> Proof:
        return await (nothing_moved if decode.name == "decode-0" else moved)()

    bench = Bench(Scripted(broken_decode), seen)
    assert len(await bench.proving.round()) == 1
    assert bench.in_rotation() == ["prefill-0", "prefill-1", "decode-1"]


async def test_a_request_to_a_lost_node_does_not_hold_up_the_round() -> None:
    async def hangs(*_: Target) -> Proof:
        await asyncio.sleep(3600)
        raise AssertionError

    bench = Bench(Scripted(hangs, moved))
    task = asyncio.create_task(bench.proving.round())
    await asyncio.sleep(0.05)
    bench.seen.heartbeat(beat(0, "prefill-0", "ready"), 10)
    bench.seen.expire(10)
    assert await asyncio.wait_for(task, 10) == []
    assert bench.events("kv-path") == [
        {
            "prefill": "prefill-0",
            "decode": "decode-0",
            "bytes": None,
            "seconds": 0.0,
            "ok": False,
            "error": "decode-0 went away during the test",
        }
    ]
    bench.seen.heartbeat(beat(1, "decode-0", "ready"), 11)
    assert await bench.proving.round() == []
    assert bench.in_rotation() == ["prefill-0", "decode-0"]


async def test_an_engine_that_dies_during_its_proof_is_not_called_broken() -> None:
    bench: Bench

    async def dies(*_: Target) -> Proof:
        failure = {"message": "killed", "cause": "unknown", "hint": ""}
        bench.seen.heartbeat(beat(1, "decode-0", "backoff", failure=failure, restart_in=1.0), 1)
        return await nothing_moved()

    bench = Bench(Scripted(dies, moved))
    assert await bench.proving.round() == []
    bench.seen.heartbeat(beat(1, "decode-0", "ready", generation=2), 2)
    assert await bench.proving.round() == []
    assert bench.in_rotation() == ["prefill-0", "decode-0"]
