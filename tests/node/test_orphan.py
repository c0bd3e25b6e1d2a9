"""What the last agents do for a job whose head node died."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.node.agent import orphan
from hpcserve.node.agent.orphan import EVERY, PATIENCE, Pause
from hpcserve.node.inputs import Inputs, load_inputs
from tests.slurm.fake_slurm import FakeSlurm
from tests.slurm.test_allocation import HEADLESS, ORPHAN

from .runs import environment, events, make_plan, make_run

WHOLE = ORPHAN.replace("NodeList=n2", "NodeList=n[1-2]")


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


@pytest.fixture
def inputs(tmp_path: Path, fake: FakeSlurm) -> Inputs:
    plan = make_plan(2)
    plan = replace(plan, site=replace(plan.site, scheduler="slurm"))
    run = make_run(tmp_path / "run", plan)
    return load_inputs(run.path, environment(1, PATH=fake.path, SLURM_JOB_ID="29"))


def pauses(
    after: Callable[[int], None] = lambda number: None, *, end: int = 1000
) -> tuple[list[float], Callable[[float], Awaitable[bool]]]:
    """Pauses that take no time; `after` runs in each, and the `end`th brings a signal."""
    taken: list[float] = []

    async def pause(seconds: float) -> bool:
        taken.append(seconds)
        after(len(taken))
        return len(taken) >= end

    return taken, pause


async def end_orphan(
    inputs: Inputs, pause: Pause, *, rank: int = 1, head: tuple[str, int] | None = None
) -> None:
    """Without `head` its node does not answer."""

    async def silent(address: str, port: int) -> bool:
        return False

    with pytest.MonkeyPatch.context() as patch:
        if head is None:
            patch.setattr(orphan, "_node_answers", silent)
        await orphan.end_orphan(inputs, rank, head or ("", 0), pause)


def looks(fake: FakeSlurm) -> int:
    return len(fake.calls("scontrol"))


def test_an_orphan_is_cancelled_and_the_log_says_why(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", ORPHAN)
    asyncio.run(end_orphan(inputs, pauses()[1]))
    assert fake.calls() == ["scontrol show job --oneliner 29", "scancel 29"]
    [failed] = events(inputs.run, "failed")
    assert failed["message"] == "the head node n1 died" and failed["exit_code"] == 6


def test_what_is_left_of_a_heterogeneous_job_is_cancelled(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", HEADLESS)
    asyncio.run(end_orphan(inputs, pauses()[1]))
    assert fake.calls()[-1] == "scancel 29"
    [failed] = events(inputs.run, "failed")
    assert failed["message"] == "the head node n3 died"


def test_a_full_disk_does_not_keep_the_nodes(inputs: Inputs, fake: FakeSlurm) -> None:
    inputs.run.events.mkdir()  # nobody can append to it
    fake.says("scontrol", ORPHAN)
    asyncio.run(end_orphan(inputs, pauses()[1]))
    assert fake.calls("scancel") == ["scancel 29"]


def test_a_slurm_that_goes_down_in_between_is_told_again_and_the_end_once(
    inputs: Inputs, fake: FakeSlurm
) -> None:
    fake.says("scontrol", ORPHAN)
    fake.says("scancel", "", error="scancel: error: Unable to contact slurm controller\n", status=1)
    asyncio.run(end_orphan(inputs, pauses(lambda n: fake.says("scancel", "") if n == 4 else None)[1]))
    assert fake.calls("scancel") == ["scancel 29"] * 4
    assert len(events(inputs.run, "failed")) == 1


def test_an_orphan_that_slurm_may_start_again_is_put_back(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", ORPHAN.replace("Requeue=0", "Requeue=1"))
    asyncio.run(end_orphan(inputs, pauses()[1]))
    assert fake.calls() == ["scontrol show job --oneliner 29", "scontrol requeue 29"]
    assert [event["event"] for event in events(inputs.run)] == ["warning"]


def test_a_job_that_has_its_head_node_is_left_alone_until_slurm_drops_it(
    inputs: Inputs, fake: FakeSlurm
) -> None:
    """Perhaps it is only our way to the head node that is cut, and other agents serve."""
    fake.says("scontrol", WHOLE)
    taken, pause = pauses(lambda number: fake.says("scontrol", ORPHAN) if number == 10 else None)
    asyncio.run(end_orphan(inputs, pause))
    assert looks(fake) == 10 and fake.calls("scancel") == ["scancel 29"]
    assert taken[1:] == [EVERY] * 9


@pytest.mark.parametrize("listens", [True, False])
def test_a_head_node_that_lives_ends_the_job_itself(inputs: Inputs, fake: FakeSlurm, listens: bool) -> None:
    """Its controller hangs, or died: agents that stayed would keep the job script waiting."""
    fake.says("scontrol", WHOLE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = server.getsockname()
        if not listens:
            server.close()
        taken, pause = pauses()
        asyncio.run(end_orphan(inputs, pause, head=head))
    assert looks(fake) == len(taken) == 1 and not fake.calls("scancel")


def test_patience_ends(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", WHOLE)
    taken, pause = pauses()
    asyncio.run(end_orphan(inputs, pause))
    assert sum(taken) == pytest.approx(PATIENCE, abs=EVERY)
    assert not fake.calls("scancel") and not events(inputs.run)


@pytest.mark.parametrize("said", [ORPHAN.replace("RUNNING", "COMPLETING"), ""])
def test_a_job_that_ends_already_is_not_ended_twice(inputs: Inputs, fake: FakeSlurm, said: str) -> None:
    fake.says("scontrol", said)
    asyncio.run(end_orphan(inputs, pauses()[1]))
    assert looks(fake) == 1 and not fake.calls("scancel") and not events(inputs.run)


def test_a_signal_ends_the_looking(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", WHOLE)
    asyncio.run(end_orphan(inputs, pauses(end=3)[1]))
    assert looks(fake) == 2


def test_a_slurm_that_is_down_is_asked_again(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.is_down()

    def back(number: int) -> None:
        if number == 3:
            fake.says("scontrol", ORPHAN)
            fake.says("scancel", "")

    asyncio.run(end_orphan(inputs, pauses(back)[1]))
    assert fake.calls("scancel") == ["scancel 29"]


def test_without_slurms_commands_on_the_node_the_user_is_told_what_to_do(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container."""
    bare = replace(inputs, environ={**inputs.environ, "PATH": str(tmp_path)})
    asyncio.run(end_orphan(bare, pauses()[1]))
    assert "end it: `scancel 29`" in capfd.readouterr().err


def test_outside_slurm_nobody_is_asked(inputs: Inputs, fake: FakeSlurm) -> None:
    outside = {name: value for name, value in inputs.environ.items() if name != "SLURM_JOB_ID"}
    asyncio.run(end_orphan(replace(inputs, environ=outside), pauses()[1]))
    assert not fake.calls()


def test_ranks_take_turns(inputs: Inputs, fake: FakeSlurm) -> None:
    fake.says("scontrol", ORPHAN)
    firsts = []
    for rank in (1, 2, 500):
        taken, pause = pauses()
        asyncio.run(end_orphan(inputs, pause, rank=rank))
        firsts.append(taken[0])
    assert firsts[0] < firsts[1] < firsts[2] == EVERY
