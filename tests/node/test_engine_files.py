"""Files that an engine reads are written before it starts, and for its user alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from hpcserve.engines.base import EngineCommand, EngineContext
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


class NoKeeper:
    def add(self, group: int) -> None:
        """Nobody is killed here."""


def test_files_of_a_command_are_there_when_it_starts(tmp_path: Path) -> None:
    only = replica("prefill-0", 0)
    facts = RankFacts(
        rank=0, node="n0", address="127.0.0.1", machine_id="m", cpus=(0,), model=ModelFact(path="m")
    )
    launcher = EngineLauncher(
        plan=make_plan(1, only),
        replica=only,
        roster=Roster(transport="tcp", attempt="a", seconds=0.0, ranks=(facts,)),
        rank=0,
        model_path="m",
        engine=Reading(),
        key="k",
        environ={},
        cpus=(),
        scratch=tmp_path / "scratch",
        run_dir=tmp_path,
        log=tmp_path / "log",
        keeper=cast(Keeper, NoKeeper()),
        find_leader=lambda _: None,
        find_seats=lambda _: {},
    )
    lines: list[str] = []
    # The second start finds the file of the first.
    for generation in (1, 2):
        running = launcher.launch(generation, None, lines.append)
        wait_for(running.exited, "the engine to end")
        running.pump.finish(10.0)
        assert running.process.returncode == 0
    assert [line.strip() for line in lines if line.strip()] == ["0o600 backend: NIXL"] * 2
