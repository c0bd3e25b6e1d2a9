"""Head, router, agents and fake engines as real processes on loopback."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import pytest

from hpcserve.config.model import KvOffloadSpec, ModelSpec, RoleSpec
from hpcserve.engines.kv_files import ROOM
from hpcserve.plan.plan import Plan
from hpcserve.rundir.atomic import read_json
from tests.patience import DEADLINE

from .jobs import Job, processes
from .runs import events, make_plan, replica, wait_for


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    plan = make_plan(4)
    (tmp_path / "kv").mkdir()
    kept = replace(plan.model, kv_offload=KvOffloadSpec(cpu_gib=1, shared_gib=1))
    at = replace(plan.site, storage=replace(plan.site.storage, kv=str(tmp_path / "kv")))
    with Job(tmp_path / "run", replace(plan, model=kept, site=at)) as running:
        running.wait("ready")
        yield running


def with_decode_args(plan: Plan, **args: object) -> Plan:
    model = replace(
        plan.model, decode=RoleSpec(engine_args={k.replace("_", "-"): v for k, v in args.items()})
    )
    return replace(plan, model=model)


def ended(job: Job) -> None:
    """All agents have gone by themselves, and nothing of the run lives."""
    wait_for(lambda: all(agent.poll() is not None for agent in job.agents), "the agents' end")
    wait_for(lambda: not job.left(), "the end of all processes")


def test_ready_means_that_kv_bytes_moved_and_a_drain_leaves_nothing(job: Job) -> None:
    # The first agent looks after the shared KV blocks from the start.
    assert 0 < read_json(job.run.path / ROOM)["bytes"] <= (1 << 30) / 40
    paths = events(job.run, "kv-path")
    assert all(path["ok"] and path["bytes"] > 0 for path in paths)
    assert {path[role] for path in paths for role in ("prefill", "decode")} == {
        replica.name for replica in job.plan.replicas
    }
    order = [event["event"] for event in events(job.run)]
    for earlier, later in [
        ("job-started", "rendezvous"),
        ("rendezvous", "engine-ready"),
        ("engine-ready", "kv-path"),
        ("kv-path", "worker-in"),
        ("worker-in", "first-token"),
        ("first-token", "ready"),
    ]:
        assert order.index(earlier) < order.index(later)
    assert job.complete()[0] == 200
    assert "READY after" in job.log("head")
    status, seen = job.ask("GET", "/status")
    assert (status, seen["state"], len(seen["workers"])) == (200, "ready", 4)
    assert job.ask("GET", "/status", key=None)[0] == 401
    assert job.ask("POST", "/stop", key="api-secret")[0] == 401
    assert job.ask("GET", "/elsewhere")[0] == 404
    for log in job.run.logs.iterdir():
        text = log.read_text()
        assert "job-secret" not in text
        assert "api-secret" not in text
        assert stat.S_IMODE(log.stat().st_mode) == 0o600 or log.name.startswith(("agent", "head"))
    assert job.ask("POST", "/drain")[0] == 200
    assert job.head is not None
    assert job.head.wait(DEADLINE) == 0
    ended(job)
    assert [agent.returncode for agent in job.agents] == [0, 0, 0, 0]
    assert [event["event"] for event in events(job.run)][-1] == "stopped"
    assert not job.run.endpoint.exists()


def test_a_killed_engine_comes_back_into_rotation_by_itself(job: Job) -> None:
    os.kill(job.engine_pid("decode-1"), signal.SIGKILL)
    job.wait("worker-out", replica="decode-1")
    assert job.complete()[0] == 200
    wait_for(lambda: job.replica("decode-1")["in_rotation"], "decode-1's return")
    assert job.replica("decode-1")["restarts"] == 1
    assert job.wait("engine-died", replica="decode-1")["restart_in"] == 1.0
    again = [path for path in events(job.run, "kv-path") if path["decode"] == "decode-1"]
    assert len(again) >= 2
    assert again[-1]["ok"]


def test_a_killed_agent_is_out_of_rotation_and_leaves_no_engine(job: Job) -> None:
    engine = job.engine_pid("decode-1")
    job.agents[3].kill()
    job.wait("worker-out", replica="decode-1")
    wait_for(lambda: not Path(f"/proc/{engine}").exists(), "the engine's end")
    assert job.complete()[0] == 200
    assert job.replica("decode-1")["state"] == "lost"


def test_a_killed_router_is_started_again_on_its_port(job: Job) -> None:
    before = read_json(job.run.endpoint)["port"]
    router = next(
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and f"{job.run.path}/router.json" in command(int(entry))
    )
    os.kill(router, signal.SIGKILL)
    wait_for(lambda: events(job.run, "warning")[-1]["message"].startswith("the router ended"), "a warning")

    def answers() -> bool:
        try:
            return job.complete()[0] == 200
        except OSError:
            return False

    wait_for(answers, "an answer")
    assert read_json(job.run.endpoint)["port"] == before


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_signal_drains_which_is_quick_when_nothing_runs(tmp_path: Path) -> None:
    plan = make_plan(2)
    plan = replace(plan, model=replace(plan.model, drain=3600))
    with Job(tmp_path / "run", plan) as job:
        job.wait("ready")
        assert job.head is not None
        assert job.stop_by_signal() == 0
        assert events(job.run, "draining")[0]["reason"] == "signal SIGTERM"
        ended(job)


@contextmanager
def endless_request(job: Job) -> Iterator[None]:
    """A request that is being answered for as long as the job lets it."""
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(job.complete(max_tokens=2000, ignore_eos=True)[0])
        except (OSError, ValueError, HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def running() -> bool:
        return bool(job.ask("GET", "/status")[1]["router"]["in_flight"])

    wait_for(running, "the request")
    yield
    thread.join(20)
    assert len(outcome) == 1
    assert outcome[0] != 200


def patient(nodes: int = 2) -> Plan:
    """A run that would drain for an hour, with slow engines."""
    plan = with_decode_args(make_plan(nodes), itl_ms=200)
    return replace(plan, model=replace(plan.model, drain=3600))


def test_a_second_signal_does_not_wait_for_running_requests(tmp_path: Path) -> None:
    with Job(tmp_path / "run", patient()) as job:
        job.wait("ready")
        assert job.head is not None
        with endless_request(job):
            job.head.send_signal(signal.SIGTERM)
            job.wait("draining")
            # Signals that come close together are one; whoever presses again does so later.
            wait_for(lambda: press(job) is not None, "the end of the head")
        assert job.head.returncode == 0
        assert [event["event"] for event in events(job.run)][-1] == "stopped"
        ended(job)


def press(job: Job) -> int | None:
    assert job.head is not None
    if job.head.poll() is None:
        job.head.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    return job.head.poll()


def test_stop_drains_and_a_second_stop_forces(tmp_path: Path) -> None:
    with Job(tmp_path / "run", patient()) as job:
        job.wait("ready")
        assert job.head is not None
        with endless_request(job):
            assert job.ask("POST", "/stop")[0] == 200
            assert job.wait("draining")["reason"] == "somebody asked for it"
            assert job.ask("GET", "/status")[1]["state"] == "draining"
            assert job.head.poll() is None
            assert job.ask("POST", "/stop")[0] == 200
            assert job.head.wait(DEADLINE) == 0
        ended(job)
        assert len(events(job.run, "stopped")) == 1
        assert events(job.run, "failed") == []


def test_a_signal_to_all_processes_of_the_job_is_no_death_of_the_router(job: Job) -> None:
    # As `scancel` does where Slurm tracks all processes.
    assert job.head is not None
    wait_for(job.run.batch_api.exists, "the Batch API's process to listen")
    marks = (f"{job.run.path}/router.json", f"hpcserve.batch api {job.run.batches}")
    for pid, line in processes():
        if any(mark in line for mark in marks) or pid in {job.head.pid, *(a.pid for a in job.agents)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    assert job.head.wait(DEADLINE) == 0
    ended(job)
    told = [entry["message"] for entry in events(job.run, "warning")]
    assert [message for message in told if "router" in message or "Batch API" in message] == []
    assert events(job.run, "draining")[0]["reason"] == "signal SIGTERM"
    assert len(events(job.run, "stopped")) == 1


def test_warnings_stand_in_the_head_log_as_errors_do(job: Job) -> None:
    [warning] = [entry for entry in events(job.run, "warning") if "as TCP" in entry["message"]]
    assert f"\nwarning: {warning['message']}\nhint: {warning['hint']}\n" in "\n" + job.log("head")


def test_a_requeued_job_serves_again_from_the_same_directory(tmp_path: Path) -> None:
    plan = make_plan(1, replica("aggregated-0", 0), **aggregated())
    end = str(int(time.time()) + 3000)
    starts: list[dict[str, object]] = []
    for count in ("0", "1"):
        env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": count, "SLURM_JOB_END_TIME": end}
        with Job(tmp_path / "run", plan, **env) as job:
            wait_for(lambda: len(events(job.run, "ready")) == len(starts) + 1, "READY")
            starts.append(read_json(job.run.head))
            assert job.complete()[0] == 200
            if count == "1":
                assert job.ask("POST", "/stop")[0] == 200
                assert job.head is not None
                assert job.head.wait(DEADLINE) == 0
                ended(job)
    assert [start["attempt"] for start in starts] == ["7.0", "7.1"]
    assert len(events(job.run, "job-started")) == 2


def test_the_stop_file_ends_the_run(tmp_path: Path) -> None:
    with Job(tmp_path / "run", make_plan(1, replica("aggregated-0", 0), **aggregated())) as job:
        job.wait("ready")
        job.run.stop.touch()
        assert job.head is not None
        assert job.head.wait(DEADLINE) == 0
        assert events(job.run, "stopped")[0]["reason"] == "the file `stop` is in the run directory"
        ended(job)


def aggregated(**args: object) -> dict[str, object]:
    model = ModelSpec(
        model="test/model",
        served_name="model",
        engine="fake",
        device="cpu",
        drain=2,
        aggregated=RoleSpec(engine_args={key.replace("_", "-"): value for key, value in args.items()}),
    )
    return {"model": model}


def test_the_walltime_ends_the_run_before_slurm_does(tmp_path: Path) -> None:
    end = int(time.time()) + 22
    plan = make_plan(1, replica("aggregated-0", 0), **aggregated())
    with Job(tmp_path / "run", plan, SLURM_JOB_END_TIME=str(end)) as job:
        job.wait("ready")
        assert read_json(job.run.endpoint)["end_time"] == end
        draining = job.wait("draining")
        assert draining["reason"] == "the walltime ends"
        # What is left after that is for the engines to end.
        assert draining["until"] < end
        assert job.head is not None
        assert job.head.wait(DEADLINE) == 0
        ended(job)


def test_an_engine_that_cannot_start_fails_the_launch_with_its_cause(tmp_path: Path) -> None:
    plan = make_plan(1, replica("aggregated-0", 0), **aggregated(no_such_flag=1))
    with Job(tmp_path / "run", plan) as job:
        assert job.head is not None
        assert job.head.wait(40) == 6
        [failed] = events(job.run, "failed")
        assert "aggregated-0 on" in failed["message"]
        assert "no-such-flag" in failed["message"]
        assert failed["hint"]
        assert "error: aggregated-0 on" in job.log("head")
        ended(job)


def test_kv_that_does_not_move_fails_the_launch(tmp_path: Path) -> None:
    plan = with_decode_args(make_plan(2), fail="drop_transfer:count=1000")
    with Job(tmp_path / "run", plan) as job:
        assert job.head is not None
        assert job.head.wait(60) == 6
        [failed] = events(job.run, "failed")
        assert "no KV cache passes from prefill-0 to decode-0" in failed["message"]
        assert not events(job.run, "kv-path")[0]["ok"]
        assert not job.run.endpoint.exists()
        ended(job)


def test_an_engine_that_never_gets_ready_fails_the_launch_in_time(tmp_path: Path) -> None:
    plan = make_plan(1, replica("aggregated-0", 0), **aggregated(fail="never_ready"))
    with Job(tmp_path / "run", replace(plan, ready_timeout=4)) as job:
        assert job.head is not None
        assert job.head.wait(40) == 6
        assert "aggregated-0" in events(job.run, "failed")[0]["message"]
        ended(job)
