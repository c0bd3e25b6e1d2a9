"""A whole job that stages its model: two ranks on this machine, which need one copy between them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hpcserve.plan.plan import Plan
from tests.node.jobs import Job, processes
from tests.node.runs import events, make_plan, wait_for

from .nodes import make_model


def staging(tmp_path: Path, **storage: object) -> Plan:
    model = tmp_path / "models" / "Tiny"
    if not model.exists():
        make_model(model)
        (tmp_path / "nvme").mkdir()
    plan = make_plan(2)
    node = replace(plan.site.storage, node_local=str(tmp_path / "nvme"), **storage)  # type: ignore[arg-type]
    return replace(
        plan,
        model=replace(plan.model, model=str(model), stage=True),
        site=replace(plan.site, storage=node),
    )


def engines(path: str) -> int:
    """How many engines were given that path."""
    wanted = f"--model {path} "
    return sum("fake_server" in command and wanted in command + " " for _, command in processes())


def test_engines_load_the_copy_and_the_next_job_finds_it(tmp_path: Path) -> None:
    with Job(tmp_path / "first", staging(tmp_path)) as job:
        job.wait("ready")
        [first] = events(job.run, "staged")
        assert first["read"] == first["bytes"] and first["nodes"] == 1
        assert Path(first["path"]).is_relative_to(tmp_path / "nvme")
        assert engines(first["path"]) == 2
        assert job.complete()[0] == 200  # under its own name
        assert job.stop_by_signal() == 0
    with Job(tmp_path / "second", staging(tmp_path, keep_staged=False)) as job:
        job.wait("ready")
        [second] = events(job.run, "staged")
        assert (second["path"], second["read"], second["reused"]) == (first["path"], 0, 1)
        assert job.stop_by_signal() == 0
        wait_for(lambda: all(agent.poll() is not None for agent in job.agents), "the agents' end")
    # This job was not to keep it.
    assert not Path(first["path"]).exists()


def test_without_a_disk_engines_load_from_the_shared_path(tmp_path: Path) -> None:
    plan = staging(tmp_path)
    # Somebody was quicker, and hopes that we write there.
    (tmp_path / "nvme" / f"hpcserve-{os.getuid()}").symlink_to(tmp_path / "models")
    with Job(tmp_path / "run", plan) as job:
        job.wait("ready")
        [told] = events(job.run, "staged")
        assert told["path"] is None
        warnings = [event for event in events(job.run, "warning") if "not staged" in event["message"]]
        assert len(warnings) == 1 and "only you can use" in warnings[0]["message"] and warnings[0]["hint"]
        assert engines(plan.model.model) == 2
        assert job.stop_by_signal() == 0
