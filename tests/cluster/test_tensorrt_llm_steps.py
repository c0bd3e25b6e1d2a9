"""TensorRT-LLM's replicas over two nodes each: one srun step per replica, real MPI, real sbatch.

The adapter, its command lines, its start module and the steps are real. TensorRT-LLM itself is stood in for
(`stand_in/`): its launcher, a server in its dialect that SIGTERM does not end, and workers that wait in MPI
on both nodes. The cluster's Slurm finds a step's processes by their parents (proctrack/linuxproc), so what it
does not find is left to hpcserve.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_llama

from . import paths, processes
from .launched import Launched, Launches
from .test_fake_disaggregated import complete, in_rotation, worker_out
from .testbed import Testbed, wait_for

MODEL = """\
model: {model}
served_name: fake
engine: tensorrt-llm
walltime: 00:20:00
prefill: {{tensor_parallel: 4, nodes: 2}}
decode: {{tensor_parallel: 4, nodes: 2}}
"""
ONE = """\
model: {model}
served_name: fake
engine: tensorrt-llm
walltime: 00:20:00
aggregated: {{tensor_parallel: 4, nodes: 2}}
"""
# Debian's Open MPI 4.1, as TensorRT-LLM's manual has it installed, and not the 5.0 of this environment: under
# Slurm's PMIx that crashes in MPI_Init on a rank that gets a message before it is done there (open-mpi/ompi
# issue 12495).
SITE = """\
extends: test-cluster
node: {{gpus: 2}}
setup:
  env: {{PYTHONPATH: {stand_in}, MPI4PY_LIBMPI: libmpi.so.40}}
  script: export PATH={stand_in}/bin:/usr/bin:/bin
"""
STAND_IN = paths.MOUNTED / "tests/cluster/stand_in"
WORKER = "tensorrt_llm.llmapi.worker"
OF_A_STEP = ("step_task", "trtllm-llmapi-launch", "tensorrt_llm_server", WORKER)
"""What the command lines of a step's processes have."""


@pytest.fixture
def run(launches: Launches) -> Iterator[Launched]:
    """A READY endpoint: prefill over two nodes, decode over two others."""
    yield from ready(launches, MODEL, nodes=4)


@pytest.fixture
def one(launches: Launches) -> Iterator[Launched]:
    """A READY endpoint of one replica over two nodes."""
    yield from ready(launches, ONE, nodes=2)


def ready(launches: Launches, text: str, nodes: int) -> Iterator[Launched]:
    model = tiny_llama(paths.MODELS / "tiny-llama")
    site = launches.file("site-of-steps.yaml", SITE.format(stand_in=STAND_IN))
    launched = launches.launch(text.format(model=model), f"--site={site}", name="steps", nodes=nodes)
    launched.wait_ready()
    yield launched
    launched.cancel()


def members(cluster: Testbed, run: Launched, replica: str) -> dict[int, str | None]:
    """The processes of a replica's step on all its nodes: id -> when each began."""
    found = {
        pid: processes.started_at(pid)
        for node in dict.fromkeys(nodes_of(run, replica))
        for pid, command in cluster.processes_of("hsuser", node).items()
        if any(word in command for word in OF_A_STEP)
    }
    # On each node two tasks, their launchers and workers; on the first one the server as well.
    assert len(found) >= 13, found
    return found


def left_of(found: dict[int, str | None]) -> list[int]:
    return [pid for pid, begun in found.items() if begun is not None and processes.started_at(pid) == begun]


def workers_on(cluster: Testbed, node: str) -> list[int]:
    """Process ids of ranks on a node."""
    found = []
    for pid in cluster.processes(node):
        try:
            if WORKER in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def nodes_of(run: Launched, replica: str) -> list[str]:
    plan = json.loads((run.run_dir / "plan.json").read_text())
    roster = json.loads((run.run_dir / "roster.json").read_text())
    ranks = next(item["nodes"] for item in plan["replicas"] if item["name"] == replica)
    return [item["node"] for item in roster["ranks"] if item["rank"] in ranks]


def told_by_ranks(run: Launched, replica: str) -> list[dict[str, Any]]:
    """What the ranks say of themselves, from the replica's one log."""
    [log] = (run.run_dir / "logs").glob(f"{replica}.*.log")
    return [json.loads(line) for line in re.findall(r"^worker (\{.*\})$", log.read_text(), re.MULTILINE)]


def steps(cluster: Testbed, run: Launched) -> dict[str, str]:
    """The replicas' steps, by name."""
    listed = cluster.slurm("squeue", "--noheader", "--steps", f"--jobs={run.job_id}", "--format=%j %i")
    found = dict(line.split() for line in listed.splitlines())
    return {name: number for name, number in found.items() if name in ("prefill-0", "decode-0")}


@pytest.mark.timeout(600)
def test_replicas_over_two_nodes_answer_come_back_and_leave_nothing(cluster: Testbed, run: Launched) -> None:
    for replica in ("prefill-0", "decode-0"):
        nodes, ranks = nodes_of(run, replica), told_by_ranks(run, replica)
        assert [r["node"] for r in sorted(ranks, key=lambda r: r["rank"])] == [n for n in nodes for _ in "12"]
        assert {rank["gpus"] for rank in ranks} == {"0,1"}
        assert len({rank["scratch"] for rank in ranks}) == 2
    before = steps(cluster, run)
    assert len(before) == 2
    status, answer = complete(run)
    assert status == 200 and answer["usage"]["completion_tokens"] == 8
    # A decode engine answers `generation_only` with what it pulled, or not at all.
    assert [event["ok"] for event in run.events("kv-path")] == [True]

    # A rank that dies on the second node takes the whole replica, and that comes back.
    second = nodes_of(run, "decode-0")[1]
    first_start = members(cluster, run, "decode-0")
    os.kill(workers_on(cluster, second)[0], signal.SIGKILL)
    wait_for(lambda: worker_out(run, "decode-0"), what="decode-0 to leave", state=run.logs)
    wait_for(lambda: "decode-0" in in_rotation(run), what="decode-0 to return", state=run.logs)
    assert left_of(first_start) == []
    assert complete(run, "again")[0] == 200
    assert len(workers_on(cluster, second)) == 2
    [died] = [event for event in run.events("engine-died") if event["replica"] == "decode-0"]
    assert died["cause"] == "mpi", died
    after = steps(cluster, run)
    assert after["prefill-0"] == before["prefill-0"] and after["decode-0"] != before["decode-0"]

    # Nobody is left who knows of the step on the replica's first node: it must not outlive them.
    found = members(cluster, run, "prefill-0")
    kill_agent(cluster, nodes_of(run, "prefill-0")[0], "prefill-0")
    wait_for(lambda: "prefill-0" not in steps(cluster, run), what="prefill-0's step to end", state=run.logs)
    wait_for(lambda: not left_of(found), what="prefill-0's processes to end", state=lambda: left_of(found))
    assert complete(run, "without prefill")[0] == 200

    run.stop()
    run.wait_gone()
    nothing_left(cluster)


@pytest.mark.timeout(600)
def test_a_cancelled_job_leaves_nothing_of_its_step(cluster: Testbed, one: Launched) -> None:
    [replica] = [item["name"] for item in json.loads((one.run_dir / "plan.json").read_text())["replicas"]]
    found = members(cluster, one, replica)
    cluster.as_user("hsuser", ["scancel", one.job_id])
    one.wait_gone()
    wait_for(lambda: not left_of(found), what="the step's processes to end", state=lambda: left_of(found))
    nothing_left(cluster)


def nothing_left(cluster: Testbed) -> None:
    def left() -> dict[str, list[str]]:
        found = {host.name: cluster.commands_of("hsuser", host.name) for host in cluster.hosts}
        return {node: commands for node, commands in found.items() if commands}

    wait_for(lambda: not left(), what="the user's processes to end", state=left)


def kill_agent(cluster: Testbed, node: str, replica: str) -> None:
    """The agent, its keeper and its replica's srun at once, as Slurm kills a step."""
    for pid in cluster.processes(node):
        try:
            program, *words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        srun = program.endswith("srun")
        if f"--job-name={replica}" in words if srun else "agent" in words:
            os.kill(pid, signal.SIGKILL)
