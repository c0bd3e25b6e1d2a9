"""Steps of several processes: real NIXL over TCP on loopback, and what breaks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.site import ContainerSite
from hpcserve.node.preflight.child import Child, ProbeFailed
from hpcserve.node.preflight.command import Command
from tests.node.jobs import processes
from tests.node.runs import events, replica, wait_for

from .doubles import broken_nixl, container_runtime
from .samples import probe
from .steps import Step, vllm_plan

pytestmark = pytest.mark.timeout(600)

THREE = (replica("prefill-0", 0), replica("decode-0", 1), replica("decode-1", 2))
TWO = THREE[:2]


def probes_of(step: Step) -> list[str]:
    """Command lines of probe processes that this step's ranks have started."""
    parents = {str(process.pid) for process in step.processes}
    return [
        command
        for _, command in processes()
        if "hpcserve.node.preflight.probe" in command and command.split()[-1] in parents
    ]


def test_every_pair_gets_figures_over_the_transport_of_model_yaml(tmp_path: Path) -> None:
    with Step(tmp_path / "run", vllm_plan(*THREE, UCX_TLS="tcp,self")) as step:
        assert step.finish() == [0, 0, 0], step.log()
        pairs = step.document["pairs"]
        assert [(pair["prefill"]["replicas"], pair["decode"]["replicas"]) for pair in pairs] == [
            (["prefill-0"], ["decode-0"]),
            (["prefill-0"], ["decode-1"]),
        ]
        for pair in pairs:
            assert pair["error"] is None
            assert [figure["operation"] for figure in pair["figures"]] == ["read", "write", "read", "write"]
            assert all(figure["gbs"] > 0 for figure in pair["figures"])
            # Without `env` of model.yaml it would be shared memory here.
            assert all(figure["transport"].startswith("tcp/lo") for figure in pair["figures"])
            assert pair["latency_us"] > 0
            assert pair["prefill"]["env"] == {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
        assert (step.event()["pairs"], step.event()["failed"]) == (2, 0)
        assert (step.run.path / "rendezvous" / "preflight-over").read_text() == "local.0 0\n"
        assert "KV preflight: 2 pairs measured by NIXL" in step.log()
        assert "job-secret" not in step.log() + step.log(1) + step.run.preflight.read_text()
        assert probes_of(step) == []


def test_a_node_whose_process_dies_is_named_and_the_others_have_figures(tmp_path: Path) -> None:
    dies = broken_nixl(tmp_path, "dies in a transfer")
    with Step(tmp_path / "run", vllm_plan(*THREE), ranks={2: dies}) as step:
        assert step.finish() == [0, 0, 0], step.log()
        assert [pair["decode"]["replicas"] for pair in step.document["pairs"]] == [["decode-0"]]
        assert step.document["pairs"][0]["error"] is None
        [told] = [message for message in step.warnings() if "(rank 2)" in message]
        assert "ended by SIGSEGV" in told
        assert not events(step.run, "failed")


def test_without_nixl_there_is_one_warning_and_the_job_goes_on(tmp_path: Path) -> None:
    missing = broken_nixl(tmp_path, "missing")
    with Step(tmp_path / "run", vllm_plan(*TWO), ranks={0: missing, 1: missing}) as step:
        assert step.finish() == [0, 0], step.log()
        [message] = step.warnings()
        assert "NIXL can't be imported: libucp.so.0" in message
        assert "(rank 0)" in message and "(rank 1)" in message
        assert step.document["pairs"] == []
        assert not events(step.run, "failed")


def test_a_backend_that_is_silently_left_out_is_noticed_and_ends_the_job(tmp_path: Path) -> None:
    without = broken_nixl(tmp_path, "no backend")
    with Step(tmp_path / "run", vllm_plan(*TWO), ranks={0: without, 1: without}) as step:
        assert step.finish() == [6, 0], step.log()
        [failed] = events(step.run, "failed")
        assert failed["exit_code"] == 6 and "NIXL has no UCX backend here" in failed["message"]
        # The job script goes by this, and not by what became of other tasks.
        assert (step.run.path / "rendezvous" / "preflight-over").read_text() == "local.0 6\n"


def test_a_transfer_that_says_done_without_bytes_is_a_failure(tmp_path: Path) -> None:
    nothing = broken_nixl(tmp_path, "moves nothing")
    with Step(tmp_path / "run", vllm_plan(*TWO), ranks={0: nothing, 1: nothing}) as step:
        assert step.finish() == [6, 0], step.log()
        [failed] = events(step.run, "failed")
        assert "was over, and other bytes had come" in failed["message"]
        assert failed["message"].startswith("no prefill node reaches any decode node by NIXL")


def test_a_transfer_that_never_ends_is_given_up(tmp_path: Path) -> None:
    never = broken_nixl(tmp_path, "never ends")
    with Step(tmp_path / "run", vllm_plan(*TWO), ranks={0: never, 1: never}) as step:
        assert step.finish() == [6, 0], step.log()
        assert "a read of 64 bytes was not over after 10 s" in events(step.run, "failed")[0]["message"]
        assert probes_of(step) == []


def test_where_engines_have_a_container_of_their_own_the_transfers_are_in_it(tmp_path: Path) -> None:
    """The node's own Python, which the agent has there, need not have NIXL."""
    apart = ContainerSite(runtime="apptainer", image="/i.sif", agent="outside", python=sys.executable)
    plan = vllm_plan(*TWO, UCX_TLS="tcp,self")
    plan = replace(plan, site=replace(plan.site, container=apart))
    outside = {**broken_nixl(tmp_path, "missing"), "HPCSERVE_APPTAINER": str(container_runtime(tmp_path))}
    with Step(tmp_path / "run", plan, ranks={0: outside, 1: outside}) as step:
        assert step.finish() == [0, 0], step.log()
        [pair] = step.document["pairs"]
        assert pair["error"] is None and pair["slowest_gbs"] > 0
        assert step.warnings() == []
        assert "WARNING: a runtime" in step.log(1)
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 2 and all(line.startswith("exec --bind=") for line in called)


def test_a_runtime_that_starts_nothing_is_named_for_it(tmp_path: Path) -> None:
    says = ("bash", "-c", "echo Error: unknown flag; exit 1")
    child = Child(probe(0), Command(argv=says, environ={"PATH": os.environ["PATH"]}, contained=True), "cpu")
    with pytest.raises(ProbeFailed, match="n0 ended with status 1"):
        asyncio.run(child.start(600))


def test_a_container_is_ended_with_what_runs_in_it(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    runtime = ("bash", "-c", f"sleep 3600 & echo $! >{inner}.new; mv {inner}.new {inner}; wait")
    command = Command(argv=runtime, environ={"PATH": os.environ["PATH"]}, contained=True)

    async def killed() -> None:
        child = Child(probe(0), command, "cpu")
        starting = asyncio.create_task(child.start(600))
        await asyncio.to_thread(wait_for, inner.exists, "what runs in it")
        await child.kill()
        with pytest.raises(ProbeFailed, match="ended by SIGKILL"):
            await starting

    asyncio.run(killed())
    pid = int(inner.read_text())
    wait_for(lambda: pid not in dict(processes()), "the end of what ran in it")


def test_term_ends_all_of_it_at_once(tmp_path: Path) -> None:
    never = broken_nixl(tmp_path, "never ends")
    with Step(tmp_path / "run", vllm_plan(*TWO), ranks={0: never, 1: never}) as step:
        wait_for(lambda: len(probes_of(step)) == 2, "both processes")
        for process in step.processes:
            process.send_signal(signal.SIGTERM)
        assert set(step.finish()) <= {143, -signal.SIGTERM}, step.log()
        wait_for(lambda: not probes_of(step), "the end of both processes")
