"""A replica over several nodes as one Slurm step: what srun gets, what its tasks do, and how it ends.

srun is stood in for by a script that starts the first task; the cluster tests have the real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from hpcserve.engines.base import EngineCommand, EngineContext
from hpcserve.engines.fake import Fake
from hpcserve.errors import EngineError
from hpcserve.node.agent.engine_launch import EngineLauncher
from hpcserve.node.agent.keeper import Keeper
from hpcserve.node.agent.running_engine import RunningEngine
from hpcserve.node.agent.seat import Seat
from hpcserve.node.agent.step import Step, hold_lifeline
from hpcserve.node.agent.step_task import MODULE, VARIABLE
from hpcserve.node.discovery.facts import ModelFact, RankFacts, Roster
from hpcserve.node.head.registry import LOST_AFTER, Entry, Heartbeat
from hpcserve.plan.plan import ReplicaPlan
from tests.patience import DEADLINE

from .runs import make_plan, replica, wait_for
from .test_engine_files import NoKeeper
from .test_registry import beat, registry
from .test_supervision import alive

SRUN = """#!/bin/sh
# The first task of a step, on this node.
env > "$PWD/srun.env"
printf '%s\\n' "$@" > "$PWD/srun.argv"
while [ "${1#--}" != "$1" ]; do shift; done
SLURMD_NODENAME=n1 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=5 exec "$@"
"""
LAUNCHER = """#!/bin/sh
echo "launched in $PWD with $NODE, key ${KEY:-none}"
exec $*
"""
# Slurm kills every task; here that is the first one, and what it started.
SCANCEL = """#!/bin/sh
echo "$@" >> "$HOME/scancel.argv"
kill -KILL 0
"""


class Stepped(Fake):
    """An engine whose replicas over several nodes are MPI programs. It prints, and waits if it is to."""

    mpi_launcher = "launcher"
    key_variable = "KEY"

    def __init__(self, seconds: float = 0, status: int = 0) -> None:
        self.seconds = seconds
        self.status = status

    def ports(self, replica: ReplicaPlan) -> Mapping[str, int]:
        return {"http": 1}

    def command(self, context: EngineContext) -> EngineCommand:
        said = "print('command', os.environ['NODE'], os.environ['KEY'], sys.argv[1:], flush=True)"
        script = f"import os, sys, time; {said}; time.sleep({self.seconds}); sys.exit({self.status})"
        argv = (sys.executable, "-c", script, "two words", "*")
        return EngineCommand(argv=argv, env={"NODE": f"place {context.node}"}, files={"file": "text\n"})


# It has a child, and that one another, which SIGTERM does not end. It tells their ids.
STUBBORN = """#!/bin/bash
trap '' TERM
(sleep 600 & echo "started $! $BASHPID"; wait) &
trap - TERM
{then}
"""


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An agent's environment in a step, with these programs first on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("launcher", LAUNCHER), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_MEM_PER_NODE": "1000",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_NTASKS": "2",
        "PMIX_RANK": "1",
    }


def launcher(tmp_path: Path, environ: Mapping[str, str], **changes: Any) -> EngineLauncher:
    """Of the head of a replica over two nodes."""
    wide = replica("decode-0", 0, 1)
    facts = tuple(
        RankFacts(
            rank=n, node=f"n{n}", address="127.0.0.1", machine_id="m", cpus=(0,), model=ModelFact(path="m")
        )
        for n in range(2)
    )
    values: dict[str, Any] = {
        "plan": make_plan(2, wide),
        "replica": wide,
        "roster": Roster(transport="tcp", attempt="a", seconds=0.0, ranks=facts),
        "rank": 0,
        "model_path": "m",
        "engine": Stepped(),
        "key": "secret",
        "environ": environ,
        "cpus": (),
        "scratch": tmp_path / "scratch",
        "run_dir": tmp_path,
        "log": tmp_path / "log",
        "keeper": cast(Keeper, NoKeeper()),
        "expect_in_memory": lambda _: (),
        "find_leader": lambda _: None,
        "find_seats": lambda _: {1: "/local/seat"},
    }
    return EngineLauncher(**{**values, **changes})


@contextmanager
def started(made: EngineLauncher, lines: list[str]) -> Iterator[RunningEngine]:
    running = made.launch(1, None, lines.append)
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def said(lines: list[str], text: str) -> bool:
    return any(text in line for line in lines)


def test_the_command_runs_in_the_first_task_with_the_key_that_no_other_has(
    tmp_path: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs["PATH"])
    scratch, lines = tmp_path / "scratch", []
    with started(launcher(tmp_path, programs), lines) as running:
        wait_for(running.exited, "the step to end")
        running.pump.finish(10.0)
        assert running.process.returncode == 0, lines
    assert said(lines, f"launched in {scratch} with place 0, key none"), lines
    assert said(lines, "command place 0 secret ['two words', '*']"), lines
    assert stat.S_IMODE((scratch / "command.json").stat().st_mode) == 0o600

    given = dict(
        line.split("=", 1) for line in (scratch / "srun.env").read_text().splitlines() if "=" in line
    )
    assert "secret" not in (scratch / "srun.env").read_text() + (scratch / "srun.argv").read_text()
    slurm = {name for name in given if name.startswith(("SLURM_", "PMIX_"))}
    assert slurm == {"SLURM_JOB_ID", "SLURM_CONF"}
    assert given["PATH"] == f"{Path(sys.executable).parent}:{programs['PATH']}"
    nodes = json.loads(given[VARIABLE])["nodes"]
    assert {name: (entry["NODE"], entry["TMPDIR"]) for name, entry in nodes.items()} == {
        "n1": ("place 0", str(scratch)),
        "n2": ("place 1", "/local/seat"),
    }
    words = (scratch / "srun.argv").read_text().splitlines()
    assert {"--overlap", "--nodelist=n1,n2", "--ntasks=2", "--ntasks-per-node=1", "--mpi=pmix"} <= set(words)
    assert {"--kill-on-bad-exit=1", "--wait=30"} <= set(words), "srun would wait for a hanging rank"
    assert words[-2:] == ["-m", MODULE]


def test_a_step_whose_agent_is_gone_is_ended_by_its_number(
    tmp_path: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs["PATH"])
    lines: list[str] = []
    with started(launcher(tmp_path, programs, engine=Stepped(600)), lines) as running:
        wait_for(lambda: said(lines, "command place 0"), "the command to run")
        # As when the agent's process ends.
        os.close(running._lifeline)  # type: ignore[attr-defined]
        wait_for(running.exited, "the step to end")
    assert (tmp_path / "scancel.argv").read_text() == "--signal=KILL 77.5\n"
    assert said(lines, "the agent is gone"), lines


def test_a_server_that_fails_ends_the_step_whose_ranks_would_wait_for_it(
    tmp_path: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs["PATH"])
    (tmp_path / "bin" / "launcher").write_text("#!/bin/bash\n$* &\nsleep 600\n")
    lines: list[str] = []
    with started(launcher(tmp_path, programs, engine=Stepped(status=3)), lines) as running:
        wait_for(running.exited, "the step to end")
        running.pump.finish(10.0)
        assert running.process.returncode == 137
    assert said(lines, "error: the replica's server ended with status 3"), lines


async def test_srun_has_time_to_end_its_tasks_even_when_it_is_to_end_at_once(
    tmp_path: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging replica is killed: by srun, which knows all its tasks."""
    monkeypatch.setenv("PATH", programs["PATH"])
    with started(launcher(tmp_path, programs, engine=Stepped(600)), lines := []) as running:
        await asyncio.to_thread(wait_for, lambda: said(lines, "command place 0"), "the command to run")
        assert await running.end(lambda: 0.0) == 128 + signal.SIGTERM


def test_a_task_that_can_not_start_says_so(programs: dict[str, str]) -> None:
    step = {
        "head": "n1",
        "nodes": {"n1": {}, "n2": {"TMPDIR": "/"}},
        "launcher": "missing",
        "command": "",
    }
    environ = {**programs, VARIABLE: json.dumps(step), "PYTHONPATH": os.pathsep.join(sys.path)}
    for node, rank, status, wrong in (
        ("n3", "1", 1, "error: n3 is not this task's node"),
        ("n2", "0", 1, "error: n2 is not this task's node"),
        ("n2", "1", 127, "error: n2 has no missing on its PATH"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            env={**environ, "SLURMD_NODENAME": node, "SLURM_PROCID": rank, "SLURM_STEP_ID": "5"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (done.returncode, wrong in done.stderr) == (status, True), done.stderr


def test_a_path_that_the_launcher_would_split_is_refused(tmp_path: Path) -> None:
    scratch = tmp_path / "my files"
    scratch.mkdir()
    step = Step(launcher="launcher", argv=("x",), secrets={}, variables={}, scratch=scratch, name="decode-0")
    with pytest.raises(EngineError, match="splits its command"):
        step.prepare()


def test_it_starts_when_the_agents_of_all_its_nodes_are_there(tmp_path: Path) -> None:
    seen = registry(3, replica("decode-0", 0, 1, 2))

    def may_start() -> bool:
        wide = replica("decode-0", 0, 1, 2)
        found = seen.seats(0).get("decode-0", {})
        return launcher(tmp_path, {}, replica=wide, find_seats=lambda _: found).may_start()

    seen.heartbeat(beat(0, "decode-0", "starting", 0), 0)
    seen.heartbeat(sitting(1), 0)
    assert not may_start()
    seen.heartbeat(sitting(2), 0)
    assert may_start() and seen.seats(0) == {"decode-0": {1: "/seat/1", 2: "/seat/2"}}
    assert seen.seats(1) == seen.seats(2) == {}
    seen.heartbeat(beat(0, "decode-0", "ready"), 1)
    seen.prove("decode-0", 1)
    assert len(seen.workers()) == 1

    # Its node died: out at once, and not started again without it.
    for rank in (0, 1):
        seen.heartbeat(beat(0, "decode-0", "ready") if rank == 0 else sitting(rank), 2 + LOST_AFTER)
    seen.expire(2 + LOST_AFTER)
    assert seen.workers() == () and not may_start()


def sitting(rank: int) -> Heartbeat:
    entry = Entry(name="decode-0", state="loading", generation=0, scratch=f"/seat/{rank}")
    return Heartbeat(rank=rank, node=f"n{rank}", pid=1, replicas=(entry,))


async def test_a_seat_holds_its_directory_until_it_is_told_to_stop(tmp_path: Path) -> None:
    changes: list[str] = []
    scratch = tmp_path / "decode-0"
    seat = Seat(name="decode-0", role="decode", scratch=scratch, changed=lambda: changes.append("changed"))
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    running = asyncio.create_task(seat.run())
    await asyncio.sleep(0)
    lifeline = os.open(scratch / "lifeline", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(lifeline, 1)
    assert seat.snapshot()["state"] == "loading" and seat.snapshot()["scratch"] == str(scratch)
    seat.stop(0.0)
    await running
    assert seat.snapshot()["state"] == "stopped" and changes
    assert os.read(lifeline, 1) == b""
    os.close(lifeline)


class Task(NamedTuple):
    """A task of a step whose launcher runs."""

    process: subprocess.Popen[str]
    started: set[int]
    """Processes that the launcher has started."""
    lifeline: int
    """What the agent holds."""


@contextmanager
def task(
    tmp_path: Path, programs: Mapping[str, str], then: str, *, rank: str = "1", head: str = "n1"
) -> Iterator[Task]:
    """Of n1. Its launcher goes on with `then`."""
    (tmp_path / "bin" / "launcher").write_text(STUBBORN.format(then=then))
    lifeline = hold_lifeline(tmp_path)
    nodes = {"n1": {"TMPDIR": str(tmp_path)}}
    step = {"head": head, "nodes": nodes, "launcher": "launcher", "command": ""}
    environ = {**programs, VARIABLE: json.dumps(step), "PYTHONPATH": os.pathsep.join(sys.path)}
    main = f"import os, sys; import {MODULE} as task; task._GRACE = 0.1; sys.exit(task.main([], os.environ))"
    with subprocess.Popen(
        [sys.executable, "-c", main],
        env={**environ, "SLURMD_NODENAME": "n1", "SLURM_PROCID": rank, "SLURM_STEP_ID": "5"},
        stdout=subprocess.PIPE,
        start_new_session=True,  # here, what ends a step ends its own group
        text=True,
    ) as process:
        assert process.stdout is not None
        found = set(map(int, process.stdout.readline().removeprefix("started ").split()))
        assert len(found) == 2
        try:
            yield Task(process, found, lifeline)
        finally:
            with suppress(OSError):
                os.close(lifeline)
            for pid in (process.pid, *found):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def children(parent: int) -> set[int]:
    """Ids of all processes below it, as Slurm's proctrack/linuxproc finds those of a step."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, more = set(), {parent}
    while more:
        found |= more
        more = {pid for pid, above in parents.items() if above in more}
    return found - {parent}


def test_what_a_launcher_leaves_ends_with_it(tmp_path: Path, programs: dict[str, str]) -> None:
    """Its rank died, and with it the launcher, which is a shell; the server goes on beside."""
    with task(tmp_path, programs, "sleep 0.3; exit 137") as (process, left, _):
        assert process.wait(DEADLINE) == 137
        assert not any(map(alive, left))


def test_a_task_that_is_told_to_end_leaves_nothing(tmp_path: Path, programs: dict[str, str]) -> None:
    with task(tmp_path, programs, "sleep 600") as (process, left, _):
        # Slurm tells all of the step. What does not end of it loses its parents first.
        for pid in (process.pid, *children(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert process.wait(DEADLINE) == 128 + signal.SIGTERM
        assert not any(map(alive, left))


def test_a_task_that_is_killed_leaves_nothing(tmp_path: Path, programs: dict[str, str]) -> None:
    with task(tmp_path, programs, "sleep 600") as (process, left, _):
        process.kill()
        wait_for(lambda: not any(map(alive, left)), "what the launcher started to end")


def test_what_was_started_while_slurm_killed_a_step_ends_too(
    tmp_path: Path, programs: dict[str, str]
) -> None:
    """It kills what it has found below the step, at once, and what began meanwhile is not among it."""
    with task(tmp_path, programs, "sleep 600") as (process, left, _):
        for pid in (process.pid, *children(process.pid) - left):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, left)), "what the launcher started to end")


def test_a_task_ends_its_own_ranks_before_it_asks_slurm_to_end_the_others(
    tmp_path: Path, programs: dict[str, str]
) -> None:
    (tmp_path / "bin" / "scancel").write_text(
        '#!/bin/sh\nfor pid in $(cat "$HOME/left"); do kill -0 "$pid" && touch "$HOME/late"; done\n'
        "kill -KILL 0\n"
    )
    with task(tmp_path, programs, "sleep 600", rank="0") as (process, left, lifeline):
        (tmp_path / "left").write_text(" ".join(map(str, left)))
        os.close(lifeline)
        assert process.wait(DEADLINE) == -signal.SIGKILL
    assert not (tmp_path / "late").exists()


def test_a_task_on_a_further_node_ends_soon_after_its_agent(tmp_path: Path, programs: dict[str, str]) -> None:
    with task(tmp_path, programs, "sleep 600", head="n2") as (process, left, lifeline):
        os.close(lifeline)
        assert process.wait(DEADLINE) == 1
        assert not any(map(alive, left))
