"""The agent's heartbeat: nothing on its node may hold it up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpcserve.http.server import serve
from hpcserve.node.agent import agent as module
from hpcserve.node.agent.agent import Agent
from hpcserve.node.agent.engine_launch import Leader, make_nicer
from hpcserve.node.agent.keeper import Keeper
from hpcserve.node.agent.replica_process import ReplicaProcess
from hpcserve.node.agent.running_engine import RunningEngine
from hpcserve.node.agent.scratch import make_scratch
from hpcserve.node.discovery.facts import Roster
from hpcserve.node.head.controller import Controller, Desk
from hpcserve.node.inputs import Inputs, load_inputs
from hpcserve.rundir.atomic import write_json
from tests.patience import DEADLINE

from .runs import environment, make_plan, make_run, replica
from .test_registry import registry
from .test_supervision import QUICK, ChildLauncher, Engine, alive


def idle_agent(tmp_path: Path, keeper: Keeper) -> tuple[Agent, Inputs]:
    """An agent of a node without replicas."""
    plan = make_plan(2, replica("aggregated-0", 0))
    inputs = load_inputs(make_run(tmp_path / "run", plan).path, environment(1))
    ranks = registry(2, replica("aggregated-0", 0)).ranks
    roster = Roster(transport="tcp", attempt=inputs.attempt, seconds=0.0, ranks=ranks)
    return Agent(inputs, roster, 1, keeper, model_path="m"), inputs


async def test_the_shared_file_system_is_asked_only_until_the_controller_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper()
    agent, inputs = idle_agent(tmp_path, keeper)
    beats: list[int] = []
    reads: list[int] = []
    real = module.read_head

    def counted(inputs: Inputs) -> Mapping[str, Any] | None:
        assert threading.current_thread() is not threading.main_thread()
        reads.append(1)
        return real(inputs)

    def heartbeat(beat: Any) -> Mapping[str, Any]:
        beats.append(beat.rank)
        return {"command": "run"}

    monkeypatch.setattr(module, "read_head", counted)
    desk = Desk(
        heartbeat=heartbeat, kv_news=lambda *_: None, status=dict, drain=lambda: None, stop=lambda: None
    )
    server = await serve(Controller(inputs.job_key, desk).handle, host="127.0.0.1", port=0)
    try:
        assert not await agent._report()
        head = {"address": "127.0.0.1", "port": server.port, "attempt": inputs.attempt}
        write_json(inputs.run.head, {**head, "attempt": "earlier"})
        assert not await agent._report()
        write_json(inputs.run.head, head)
        for _ in range(5):
            assert await agent._report()
        assert len(reads) == 3
        assert beats == [1] * 5
        await server.close()
        assert not await agent._report()
        assert not await agent._report()
        assert len(reads) == 4
    finally:
        await server.close()
        await agent.close()
        keeper.close()


async def test_a_program_on_a_slow_file_system_does_not_stop_the_agent(tmp_path: Path) -> None:
    loop_went_on = threading.Event()
    launched = threading.Event()
    waited: list[bool] = []

    class Slow(ChildLauncher):
        def launch(
            self, generation: int, leader: Leader | None, on_line: Callable[[str], None]
        ) -> RunningEngine:
            waited.append(loop_went_on.wait(DEADLINE))
            launched.set()
            return super().launch(generation, leader, on_line)

    async def unhealthy(_: str) -> bool:
        return False

    process = ReplicaProcess(
        name="decode-0",
        role="decode",
        engine=Engine(),
        launcher=Slow(tmp_path),
        patience=QUICK,
        healthy=unhealthy,
        changed=lambda: None,
        ended=lambda pid: None,
    )
    task = asyncio.create_task(process.run())
    await asyncio.sleep(0.05)
    assert process.snapshot()["state"] == "starting"
    loop_went_on.set()
    assert await asyncio.to_thread(launched.wait, 10)
    process.stop(0.0)
    await asyncio.wait_for(task, 20)
    assert waited == [True]


def test_the_scratch_directory_goes_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    scratch = make_scratch(str(tmp_path))
    (scratch / "decode-0").mkdir()
    (scratch / "decode-0" / "socket").touch()
    script = (
        "import pathlib, sys, time\n"
        "from hpcserve.node.agent.keeper import Keeper\n"
        "keeper = Keeper()\n"
        "keeper.sweep(pathlib.Path(sys.argv[1]))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script, str(scratch)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    agent.kill()
    agent.wait(DEADLINE)
    agent.stdout.close()
    deadline = time.monotonic() + DEADLINE
    while scratch.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_on_the_cpu_leaves_time_to_the_agent() -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert alive(child.pid)
        make_nicer(child.pid)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(19, own + 5)
        group = Path(f"/proc/{child.pid}/autogroup")
        if group.exists() and os.access(group, os.W_OK):
            assert group.read_text().split()[-1] == "5"
    finally:
        child.kill()
        child.wait(DEADLINE)
