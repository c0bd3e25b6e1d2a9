"""Run directories and in-job processes for these tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.config.records import to_json
from hpcserve.config.site import NetworkSite, NodeSite, PortsSite, Site, SlurmSite
from hpcserve.plan.plan import Plan, ReplicaPlan
from hpcserve.rundir.atomic import write_json, write_text
from hpcserve.rundir.events import read_events
from hpcserve.rundir.layout import RunDir
from tests.patience import DEADLINE


def replica(name: str, *nodes: int, gpus: tuple[int, ...] = (0,)) -> ReplicaPlan:
    return ReplicaPlan(
        name=name,
        role=name.partition("-")[0],  # type: ignore[arg-type]
        nodes=nodes,
        gpus=gpus,
        tensor_parallel=len(gpus),
        pipeline_parallel=1,
        data_parallel=1,
        expert_parallel=False,
    )


def make_plan(nodes: int = 1, *replicas: ReplicaPlan, **changes: Any) -> Plan:
    """A plan for fake engines on loopback; prefill and decode alternate unless replicas are given."""
    roles = ("prefill", "decode")
    placed = replicas or tuple(replica(f"{roles[n % 2]}-{n // 2}", n) for n in range(nodes))
    values: dict[str, Any] = {
        "name": "test",
        "model": ModelSpec(
            model="test/model",
            served_name="model",
            engine="fake",
            device="cpu",
            prefill=RoleSpec(),
            decode=RoleSpec(),
            drain=2,
        ),
        "site": Site(
            name="test",
            scheduler="local",
            node=NodeSite(gpus=0, cpu_engines=4),
            network=NetworkSite(kind="loopback"),
            slurm=SlurmSite(kill_wait=10),
            ports=PortsSite(low=21000, high=27999),
        ),
        "device": "cpu",
        "nodes": nodes,
        "slots_per_node": 4,
        "served_name": "model",
        "walltime": 3600,
        "ready_timeout": 60,
        "replicas": placed,
    }
    return Plan(**{**values, **changes})


def make_run(path: Path, plan: Plan, *, job_key: str = "job-secret") -> RunDir:
    run = RunDir(path)
    for directory in (run.path, run.secrets, run.ranks, run.logs):
        directory.mkdir(mode=0o700, exist_ok=True)
    write_json(run.plan, to_json(plan))
    write_text(run.job_key, job_key + "\n")
    write_text(run.api_key, "api-secret\n")
    return run


def environment(rank: int | None = None, **more: str) -> dict[str, str]:
    """This environment without anything a launcher may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMIX_", "PRTE_", "HPCSERVE_"))
    }
    if rank is not None:
        kept["HPCSERVE_RANK"] = str(rank)
    return {**kept, **more}


def node_program(program: str, run: RunDir, *options: str) -> list[str]:
    return [sys.executable, "-m", "hpcserve.node", program, "--run-dir", str(run.path), *options]


def start(command: list[str], env: Mapping[str, str], log: Path | None = None) -> subprocess.Popen[str]:
    output: Any = subprocess.PIPE
    if log is not None:
        output = log.open("a")
    try:
        return subprocess.Popen(command, env=dict(env), stdout=output, stderr=subprocess.STDOUT, text=True)
    finally:
        if log is not None:
            output.close()


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit status and output; a process that does not end is killed and fails the test."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"did not end within {seconds} s:\n{output}") from None
    return process.returncode, output or ""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first truthy value of `condition`; fails the test when none comes in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def events(run: RunDir, name: str | None = None) -> list[dict[str, Any]]:
    return [event for event, _ in read_events(run.events) if name is None or event["event"] == name]
