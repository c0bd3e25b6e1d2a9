"""The coordinator with members that are made up: nodes that are silent or die, and time that runs out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcserve.node.discovery.facts import ModelFact, RankFacts, Roster
from hpcserve.node.frames import Channel, connect
from hpcserve.node.inputs import Inputs
from hpcserve.node.ports import PortRange, listen
from hpcserve.node.preflight import coordinator as module
from hpcserve.node.preflight.coordinator import Coordinator
from hpcserve.node.preflight.ending import is_over, tell_over
from hpcserve.node.preflight.member import Member
from hpcserve.node.preflight.records import Outcome, Probe, to_json
from tests.node.runs import make_plan, make_run

from .samples import probe

MEMORY = {"metadata": "", "source": 1, "sink": 2, "size": 64, "kind": "DRAM", "device": 0, "seconds": 0.1}
FIGURE = {"gbs": 1.0, "size": 64, "latency_us": 5.0, "transport": None, "devices": [], "link_gbs": None}


class Made:
    """A member that answers, until told otherwise."""

    def __init__(self, rank: int, *probes: Probe, dies_at: int | None = None) -> None:
        self.rank = rank
        self.probes = probes
        self.commands: list[dict[str, Any]] = []
        self._dies_at = dies_at

    async def run(self, port: int, key: bytes = b"job-secret") -> None:
        channel = await connect("127.0.0.1", port, key=key, attempt="local.0", seconds=10)
        assert channel is not None
        try:
            probes = [to_json(one) for one in self.probes]
            await channel.send({"rank": self.rank, "node": f"n{self.rank}", "probes": probes})
            await channel.receive()
            for one in self.probes:
                await channel.send({"probe": one.name, "ready": MEMORY})
            await self._serve(channel)
        finally:
            await channel.close()

    async def _serve(self, channel: Channel) -> None:
        while True:
            message = await channel.receive()
            if message.get("over"):
                return
            if "replace" in message:
                await channel.send({"probe": message["replace"], "ready": MEMORY})
                continue
            self.commands.append(message["command"])
            if self._dies_at is not None and len(self.commands) >= self._dies_at:
                return
            await channel.send({"id": message["id"], **self.answer(message["command"])})

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"answer": FIGURE if command["ask"] == "measure" else {"came": True}}


class NeverReady(Made):
    """It comes, and is never heard of again."""

    async def run(self, port: int, key: bytes = b"job-secret") -> None:
        channel = await connect("127.0.0.1", port, key=key, attempt="local.0", seconds=10)
        assert channel is not None
        probes = [to_json(one) for one in self.probes]
        await channel.send({"rank": self.rank, "node": f"n{self.rank}", "probes": probes})
        await channel.receive()
        await channel.receive()
        await channel.close()


class Unreached(Made):
    """Its reads and writes fail."""

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["ask"] == "measure":
            return {"broken": {"cause": "timeout", "message": "nothing came"}}
        return {"answer": {"came": True}}


def roster_of(ranks: int) -> Roster:
    facts = [
        RankFacts(
            rank=rank,
            node=f"n{rank}",
            address="127.0.0.1",
            machine_id="m",
            cpus=(0,),
            model=ModelFact(path="m"),
        )
        for rank in range(ranks)
    ]
    return Roster(transport="tcp", attempt="local.0", seconds=0.1, ranks=tuple(facts))


def measure(root: Path, ranks: int, members: Sequence[Made], leave: Sequence[Made] = ()) -> Outcome:
    """`leave` are members that do not end by themselves."""
    run = make_run(root / "run", make_plan(ranks))
    inputs = Inputs(run=run, plan=make_plan(ranks), job_key="job-secret", attempt="local.0", environ={})
    roster = roster_of(ranks)

    async def together() -> Outcome:
        coordinator = Coordinator(inputs, roster)
        listening = listen(PortRange(low=21000, high=27999, seed=str(root)), "127.0.0.1")
        server = await coordinator.serve(listening)
        port = listening.getsockname()[1]
        tasks = {member: asyncio.create_task(member.run(port)) for member in members}
        try:
            return await coordinator.run()
        finally:
            await coordinator.dismiss()
            server.close()
            for member in leave:
                tasks[member].cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    return asyncio.run(together())


def test_a_node_that_comes_when_all_is_over_leaves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_plan(2))
    inputs = Inputs(run=run, plan=make_plan(2), job_key="job-secret", attempt="local.0", environ={})
    roster = roster_of(2)
    tell_over(run, "local.1", 0)
    assert not is_over(run, inputs.attempt), "that was another start of the job"
    tell_over(run, inputs.attempt, 6)
    member = Member(inputs, roster, 1, ())
    asyncio.run(member.run())


def one_prefill(decodes: int) -> list[Made]:
    return [
        Made(0, probe(0, "prefill")),
        *(Made(rank, probe(rank, "decode")) for rank in range(1, decodes + 1)),
    ]


def test_all_pairs_are_measured_in_both_directions(tmp_path: Path) -> None:
    members = one_prefill(2)
    outcome = measure(tmp_path, 3, members)
    assert [(pair.prefill.node, pair.decode.node) for pair in outcome.pairs] == [("n0", "n1"), ("n0", "n2")]
    assert (outcome.unmeasured, outcome.broken) == (0, {})
    asked = [(command["ask"], command.get("operation")) for command in members[1].commands]
    assert asked == [("measure", "read"), ("came", None), ("measure", "write")]


def test_a_node_that_never_comes_is_named_and_its_pairs_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN", 0.5)
    outcome = measure(tmp_path, 3, one_prefill(1))
    assert [pair.decode.node for pair in outcome.pairs] == ["n1"]
    assert outcome.broken["n2"].cause == "silent"
    assert "n2 did not come" in outcome.broken["n2"].message


def test_whether_any_kv_goes_over_nvlink_is_known_of_both_ends(tmp_path: Path) -> None:
    def members(decode: bool) -> list[Made]:
        ends = replace(probe(0, "prefill"), nvlink=True), replace(probe(1, "decode"), nvlink=decode)
        return [Made(rank, end) for rank, end in enumerate(ends)]

    assert measure(tmp_path, 2, members(decode=True)).nvlink
    assert not measure(tmp_path, 2, members(decode=False)).nvlink


def test_a_stranger_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN", 0.5)

    class Stranger(Made):
        async def run(self, port: int, key: bytes = b"") -> None:
            await super().run(port, b"guessed")

    outcome = measure(tmp_path, 3, [*one_prefill(1), Stranger(2, probe(2, "decode"))])
    assert [pair.decode.node for pair in outcome.pairs] == ["n1"]
    assert "refused: 127.0.0.1 does not know the job's key" in outcome.broken["n2"].message


def test_a_node_that_dies_in_the_middle_is_named_and_holds_nobody(tmp_path: Path) -> None:
    members = [*one_prefill(1), Made(2, probe(2, "decode"), dies_at=1)]
    outcome = measure(tmp_path, 3, members)
    assert [pair.decode.node for pair in outcome.pairs] == ["n1"]
    assert outcome.broken["n2"].cause == "died"
    assert (outcome.unmeasured, set(outcome.broken)) == (1, {"n2"})


def test_a_pair_that_fails_is_one_that_was_measured(tmp_path: Path) -> None:
    outcome = measure(tmp_path, 3, [*one_prefill(1), Unreached(2, probe(2, "decode"))])
    failed = [pair for pair in outcome.pairs if pair.broken is not None]
    assert [pair.decode.node for pair in failed] == ["n2"]
    assert outcome.broken == {}


def test_when_time_is_up_every_node_was_measured_once_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT", -1.0)
    members = [Made(rank, probe(rank, "prefill")) for rank in range(2)]
    members += [Made(rank, probe(rank, "decode")) for rank in range(2, 6)]
    outcome = measure(tmp_path, 6, members)
    assert (len(outcome.pairs), outcome.unmeasured) == (4, 4)
    assert {end.node for pair in outcome.pairs for end in (pair.prefill, pair.decode)} == {
        f"n{rank}" for rank in range(6)
    }


def test_while_nothing_works_other_pairs_are_tried_after_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n0 and n3 are cut off, and not each other's first partners: only n1 with n2 works."""
    monkeypatch.setattr(module, "LIMIT", -1.0)

    cut = {"0.0", "3.0"}

    class Reaches(Made):
        def answer(self, command: dict[str, Any]) -> dict[str, Any]:
            if command["ask"] == "measure" and {command["peer"], self.probes[0].name} & cut:
                return {"broken": {"cause": "timeout", "message": "nothing came"}}
            return super().answer(command)

    members = [Reaches(rank, probe(rank, "prefill")) for rank in range(2)]
    members += [Reaches(rank, probe(rank, "decode")) for rank in (2, 3)]
    outcome = measure(tmp_path, 4, members)
    assert [(p.prefill.node, p.decode.node) for p in outcome.pairs if p.broken is None] == [("n1", "n2")]


def test_rank_0_is_done_in_time_whatever_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PREFLIGHT_TIMEOUT", 0.5)
    outcome = measure(tmp_path, 2, [Made(0, probe(0, "prefill")), NeverReady(1, probe(1, "decode"))])
    assert (outcome.pairs, outcome.unmeasured, outcome.cut_short) == ((), 1, False)
    assert outcome.broken == {}, "that took as long as it was given"


def test_a_node_that_hangs_before_nixl_is_ready_is_named_and_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without an end to the waiting, this test would not end in time.
    until = Coordinator._until

    async def impatient(self: Coordinator, condition: Any, seconds: float) -> None:
        await until(self, condition, 1.0 if seconds > module.JOIN else seconds)

    monkeypatch.setattr(Coordinator, "_until", impatient)
    outcome = measure(tmp_path, 3, [*one_prefill(1), NeverReady(2, probe(2, "decode"))])
    assert [pair.decode.node for pair in outcome.pairs] == ["n1"]
    assert outcome.broken["n2"].cause == "silent"
    assert "n2 did not say within" in outcome.broken["n2"].message


def test_what_looks_slow_is_measured_again(tmp_path: Path) -> None:
    class Hiccup(Made):
        """Slow the first time."""

        def answer(self, command: dict[str, Any]) -> dict[str, Any]:
            if command["ask"] != "measure":
                return super().answer(command)
            slow = sum(earlier["ask"] == "measure" for earlier in self.commands) <= 2
            return {"answer": {**FIGURE, "gbs": 0.01 if slow else 1.0}}

    outcome = measure(tmp_path, 4, [*one_prefill(2), Hiccup(3, probe(3, "decode"))])
    assert [pair.gbs for pair in outcome.pairs] == [1.0, 1.0, 1.0]


def test_a_node_that_falls_silent_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPERATION", 0.2)
    monkeypatch.setattr(module, "_ANSWER", 0.3)

    class Silent(Made):
        """Its power is cut: no connection ends, and nothing is answered."""

        async def _serve(self, channel: Channel) -> None:
            await asyncio.sleep(3600)

    members = [Made(rank, probe(rank, "prefill")) for rank in range(2)]
    silent = Silent(3, probe(3, "decode"))
    outcome = measure(tmp_path, 4, [*members, Made(2, probe(2, "decode")), silent], leave=[silent])
    assert [(pair.prefill.node, pair.decode.node) for pair in outcome.pairs] == [("n0", "n2"), ("n1", "n2")]
    assert {node: broken.cause for node, broken in outcome.broken.items()} == {"n3": "silent"}
    assert outcome.unmeasured == 2
