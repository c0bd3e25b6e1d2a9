"""Files that an engine reads are written before it starts, for its user alone; those in memory go with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hpcserve.engines.base import Engine, EngineCommand, EngineContext
from hpcserve.engines.fake import Fake
from hpcserve.node.agent.engine_launch import EngineLauncher
from hpcserve.node.agent.keeper import Keeper
from hpcserve.node.discovery.facts import ModelFact, RankFacts, Roster
from hpcserve.plan.plan import ReplicaPlan

from .runs import make_plan, replica, wait_for

SHOW = (
    "import os, sys; print(oct(os.stat(sys.argv[1]).st_mode & 0o777), open(sys.argv[1]).read(), flush=True)"
)


class Reading(Fake):
    """An engine that prints its file, and ends."""

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        return {"http": 1}

    def command(self, context: EngineContext) -> EngineCommand:
        argv = (sys.executable, "-c", SHOW, f"{context.scratch}/engine.yaml")
        return EngineCommand(argv=argv, env={}, files={"engine.yaml": "backend: NIXL\n"})


class Sharing(Reading):
    """An engine that leaves a file in memory when it is killed."""

    def shared_memory(self, context: EngineContext) -> tuple[str, ...]:
        return (context.start,)

    def command(self, context: EngineContext) -> EngineCommand:
        return EngineCommand(argv=("sleep", "600"), env={})


class NoKeeper:
    def add(self, group: int) -> None:
        """Nobody is killed here."""


def launcher(tmp_path: Path, engine: Engine, **more: Any) -> EngineLauncher:
    only = replica("prefill-0", 0)
    facts = RankFacts(
        rank=0, node="n0", address="127.0.0.1", machine_id="m", cpus=(0,), model=ModelFact(path="m")
    )
    values: dict[str, Any] = {
        "plan": make_plan(1, only),
        "replica": only,
        "roster": Roster(transport="tcp", attempt="a", seconds=0.0, ranks=(facts,)),
        "rank": 0,
        "model_path": "m",
        "engine": engine,
        "key": "k",
        "environ": {},
        "cpus": (),
        "scratch": tmp_path / "scratch",
        "run_dir": tmp_path,
        "log": tmp_path / "log",
        "keeper": cast(Keeper, NoKeeper()),
        "expect_in_memory": lambda _: (),
        "find_leader": lambda _: None,
        "find_seats": lambda _: {},
    }
    return EngineLauncher(**{**values, **more})


def test_files_of_a_command_are_there_when_it_starts(tmp_path: Path) -> None:
    lines: list[str] = []
    # The second start finds the file of the first.
    for generation in (1, 2):
        running = launcher(tmp_path, Reading()).launch(generation, None, lines.append)
        wait_for(running.exited, "the engine to end")
        running.pump.finish(10.0)
        assert running.process.returncode == 0
    assert [line.strip() for line in lines if line.strip()] == ["0o600 backend: NIXL"] * 2


async def test_memory_that_a_killed_engine_leaves_is_free_before_the_next_start(tmp_path: Path) -> None:
    expected: list[str] = []

    def expect(names: Sequence[str]) -> tuple[Path, ...]:
        expected.extend(names)
        return tuple(tmp_path / name for name in names)

    first = launcher(tmp_path, Sharing(), expect_in_memory=expect)
    again = replace(first, roster=replace(first.roster, attempt="b"))
    elsewhere = replace(first, run_dir=tmp_path / "other")
    for made, generation in ((first, 1), (first, 2), (again, 1), (elsewhere, 1)):
        running = made.launch(generation, None, lambda _: None)
        left = tmp_path / expected[-1]
        left.write_text("blocks")
        await running.end(lambda: 0.0)
        assert not left.exists()
    assert len(set(expected)) == 4


def test_all_processes_of_a_start_have_one_name(tmp_path: Path) -> None:
    wide = replica("prefill-0", 0, 1)
    names = []
    for rank in (0, 1):
        made = launcher(tmp_path, Sharing(), replica=wide, rank=rank)
        made = replace(made, roster=replace(made.roster, ranks=made.roster.ranks * 2))
        names.append(made._context({}, 3).start)
    assert names[0] == names[1] and names[0].startswith("prefill-0-3-")
