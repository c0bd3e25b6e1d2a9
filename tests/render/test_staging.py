"""The job script of a model that is staged: between the rendezvous and the agents, and all or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.site import Site, StorageSite
from hpcserve.render.containers import binds
from hpcserve.render.engine import render_commands
from hpcserve.render.script import render_script

from .cases import RUN_DIR, contained, dgx, local, pair, plan
from .job import Job

SERVES = {"agent": "terms 1 0", "head": "after 1 0"}


def job(root: Path, programs: dict[str, str], site: Site | None = None) -> Job:
    directory = root / "run"
    what = plan(site or dgx(), model=pair(stage=True, kv_preflight=False), nodes=2)
    return Job(root, render_script(what, directory, python="python"), directory, programs)


def test_the_model_is_staged_before_the_agents_start(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES).run()
    assert done.status == 0, done.errors
    assert done.programs[:3] == ["mpi-list", "rendezvous-mpi", "stage"]
    step = done.call("stage").argv
    assert {"--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--nodes=2", "--ntasks=2"} <= set(
        step
    )
    assert f"--output={tmp_path}/run/logs/staging-%t.log" in step
    assert sorted(done.programs[3:]) == ["agent", "close", "head"]


@pytest.mark.parametrize("site", [dgx(), local()])
def test_no_engine_starts_after_staging_failed(tmp_path: Path, site: Site) -> None:
    failed = job(tmp_path, SERVES | {"stage": "exit 7"}, site).run()
    assert failed.status == 7
    assert {"agent", "head"} & set(failed.programs) == set()
    assert "staging the model failed with status 7" in failed.errors
    assert failed.call("close").argv[-4:] == ["--stage", "staging", "--status", "7"]


def test_a_job_that_is_told_to_end_while_it_stages_ends(tmp_path: Path) -> None:
    running = job(tmp_path, SERVES | {"stage": "terms 1 143"}).start()
    running.until_up("stage")
    running.term()
    assert running.wait() == 143
    assert "agent" not in running.programs
    assert running.left_over() == []


def test_local_ranks_stage_each(tmp_path: Path) -> None:
    done = job(tmp_path, SERVES | {"head": "after 2 0"}, local()).run()
    assert done.status == 0, done.errors
    assert sorted(call.rank for call in done.calls if call.program == "stage") == ["0", "1"]


def test_a_container_sees_the_nodes_own_tmp(tmp_path: Path) -> None:
    site = contained(dgx(), "pyxis")
    assert "/tmp:/tmp" in binds(plan(site, model=pair(stage=True)), RUN_DIR)
    nvme = replace(site, storage=StorageSite(node_local="/nvme"))
    assert binds(plan(nvme, model=pair(stage=True)), RUN_DIR)[0] == "/nvme:/nvme"


def test_commands_to_read_leave_the_path_to_the_job() -> None:
    text = render_commands(plan(dgx(), model=pair(stage=True)), python="python")
    assert '--model "$MODEL"' in text
    assert "MODEL         the staged copy" in text
