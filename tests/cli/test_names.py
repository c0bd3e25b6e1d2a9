"""Which run a name means, and what a launch does when its name is taken."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from hpcserve import launch as launching
from hpcserve.slurm.sbatch import SlurmScheduler

from .conftest import Answer, World
from .jobs import writes_events

STOPPED = writes_events({"event": "stopped", "reason": "asked to"})


def submit(world: World, job_id: int, job: str = "true\n", name: str = "demo", *more: str) -> Answer:
    world.slurm.accepts(job_id)
    world.slurm.runs(job)
    answer = world("launch", "--nodes", "4", "--name", name, "--no-wait", *more, "model.yaml")
    assert answer.status == 0, answer.err
    return answer


def meant(world: World, text: str) -> str:
    answer = world("status", "--json", text)
    assert answer.status == 0, answer.err
    return str(json.loads(answer.out)["name"])


def ids(world: World) -> list[str]:
    """Newest first."""
    return [run["name"] for run in json.loads(world("ls", "--json").out)["runs"]]


def test_a_name_means_the_newest_run_of_that_name(world: World) -> None:
    for job_id in (41, 42, 43):
        submit(world, job_id)
    newest, middle, oldest = ids(world)
    assert oldest == "demo"
    assert meant(world, "demo") == newest
    assert meant(world, middle) == middle
    assert meant(world, "41") == oldest
    assert meant(world, "dem") == newest


def test_a_live_run_is_meant_rather_than_a_newer_one_that_is_over(world: World) -> None:
    submit(world, 41, STOPPED)
    submit(world, 42)
    submit(world, 43, STOPPED)
    world.slurm.shows("42|RUNNING|1790000000|1990003600|n[1-4]|None")
    _, live, _ = ids(world)
    assert meant(world, "demo") == live
    world.slurm.shows("42|COMPLETED|1790000000|1790003600|n[1-4]|None")
    assert meant(world, "demo") == ids(world)[0]


def test_a_launch_says_which_id_it_got_when_its_name_was_taken(world: World) -> None:
    assert "was taken" not in submit(world, 41).err
    second = submit(world, 42).err
    [run_id, _] = ids(world)
    assert f"this run is '{run_id}'" in second
    assert f"hpcserve stop {run_id}" in second


def test_two_launches_at_the_same_time_both_get_a_run(world: World) -> None:
    """The other one's directory appears between planning and making ours."""
    submit(world, 41)
    taken = launching.free_run_id
    world.monkeypatch.setattr(launching, "free_run_id", lambda root, name: name)
    world.slurm.accepts(42)
    wanted = launching.LaunchRequest(model=world.model, nodes=4, name="demo")
    request = launching.prepare(wanted, os.environ, "x")
    world.monkeypatch.setattr(launching, "free_run_id", taken)
    run = launching.submit(request, ("hpcserve",))
    assert run.record.run_id.startswith("demo-")
    assert str(run.directory.path) in run.directory.script.read_text()
    assert run.record.job_id == "42"
    assert len(ids(world)) == 2


def test_ctrl_c_while_sbatch_runs_takes_the_job_back(world: World) -> None:
    real = SlurmScheduler.submit
    before = signal.getsignal(signal.SIGINT)

    def interrupted(
        scheduler: SlurmScheduler, script: Path, run_dir: Path, *, after: str | None = None
    ) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return real(scheduler, script, run_dir, after=after)

    world.monkeypatch.setattr(SlurmScheduler, "submit", interrupted)
    answer = world("launch", "--nodes", "4", "--no-wait", "model.yaml")
    assert answer.status == 130
    assert world.slurm.calls("scancel") == ["scancel 42"]
    assert world.files() == set()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_of_a_site_file_is_found_by_its_directory_and_the_launch_says_so(world: World) -> None:
    site = world.home / "far.yaml"
    site.write_text(f"extends: test-cluster\nstorage: {{runs: {world.home}/far}}\n")
    launched = submit(world, 42, "true\n", "demo", "--site", "./far.yaml")
    assert f"hpcserve status {world.home}/far/demo" in launched.err
    assert world("status", "demo").status == 8
    assert meant(world, f"{world.home}/far/demo") == "demo"
    assert world("status", str(world.home)).status == 8
    world.monkeypatch.setenv("HPCSERVE_SITE", str(site))
    assert meant(world, "demo") == "demo"


def test_a_run_that_can_not_be_read_hides_no_other(world: World) -> None:
    submit(world, 41)
    submit(world, 42, name="other")
    (world.runs / "other" / "run.json").write_text("{}")
    answer = world("ls")
    assert "demo" in answer.out
    assert "other" in answer.err
    assert answer.status == 0
    (world.runs / "demo" / "plan.json").write_text("{")
    assert "demo" in world("ls").out


@pytest.mark.parametrize("shown", ["4:00", "90:30"])
def test_minutes_and_seconds_of_a_walltime_are_pointed_out(world: World, shown: str) -> None:
    answer = world("launch", "--dry-run", "--nodes", "4", "--walltime", shown, "model.yaml")
    assert f"{shown}:00" in answer.err
    hours = world("launch", "--dry-run", "--nodes", "4", "--walltime", "4:00:00", "model.yaml")
    assert "minutes and seconds" not in hours.err


def test_what_is_written_as_files_is_also_one_json_document(world: World) -> None:
    answer = world("launch", "--nodes", "4", "--output-script", "out", "--json", "model.yaml")
    document = json.loads(answer.out)
    assert document["files"]["job.sh"] == (world.home / "out/job.sh").read_text()


def test_a_runs_path_that_can_not_exist_is_no_traceback(world: World) -> None:
    world.monkeypatch.setenv("HPCSERVE_RUNS", "/" + "x" * 300)
    answer = world("launch", "--nodes", "4", "model.yaml")
    assert answer.status == 7
    assert "File name too long" in answer.err
    assert "HPCSERVE_RUNS" in answer.err
