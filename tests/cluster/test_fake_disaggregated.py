"""2 prefill + 2 decode fake engines through real sbatch as an ordinary user, and what breaks them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from hpcserve.node.agent.agent import HEAD_LOST
from tests.patience import DEADLINE

from .launched import Launched, Launches, bearer
from .testbed import Testbed, wait_for

MODEL = """\
model: example/nothing-to-load
served_name: fake
engine: fake
walltime: 00:20:00
prefill: {replicas: 2, nodes: 2}
decode: {replicas: 2, nodes: 2}
max_model_len: 4096
engine_args: {itl-ms: 20}
"""
PROMPT = "Tell me how a queue works, in as many words as it takes. "


@pytest.fixture
def run(launches: Launches) -> Iterator[Launched]:
    """A READY endpoint on all four nodes."""
    launched = launches.launch(MODEL, name="fake")
    launched.wait_ready()
    yield launched
    launched.cancel()


@pytest.fixture(scope="module")
def unbroken() -> list[str]:
    """The texts of the 50 streams when nothing breaks, the same in every run; made by who comes first."""
    return []


def replica_away_from_head(run: Launched, role: str) -> str:
    head = json.loads((run.run_dir / "head.json").read_text())["node"]
    names = [f"{role}-{index}" for index in range(2)]
    return next(name for name in names if run.node_of(name) != head)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a client saw of one stream."""

    text: str
    tokens: int
    error: str | None
    longest_gap: float
    """Seconds between two tokens."""
    gap_began: float
    """Unix time."""


def read_stream(run: Launched, number: int, tokens: int) -> Streamed:
    body = {"model": "fake", "prompt": f"{number} {PROMPT}", "max_tokens": tokens, "ignore_eos": True}
    text, seen, gap, began, last = "", 0, 0.0, 0.0, time.time()
    try:
        for event in run.stream(body):
            now = time.time()
            if seen and now - last > gap:
                gap, began = now - last, last
            last = now
            if "error" in event:
                return Streamed(text, seen, str(event["error"]), gap, began)
            piece = event["choices"][0]["text"] if event["choices"] else ""
            text += piece
            seen += bool(piece)
    except OSError as error:
        return Streamed(text, seen, repr(error), gap, began)
    return Streamed(text, seen, None, gap, began)


def complete(run: Launched, prompt: str = PROMPT, tokens: int = 8) -> tuple[int, Any]:
    return run.request("/completions", {"model": "fake", "prompt": prompt, "max_tokens": tokens})


def test_a_rank_that_never_shows_up_is_named_and_ends_the_wait(cluster: Testbed, launches: Launches) -> None:
    spec = launches.file("absent.yaml", MODEL)
    with cluster.frozen_slurmd("n3"):  # Slurm still calls the node idle, and it never starts a task
        launch = ("launch", "--nodes=4", "--site=test-cluster", "--name=absent", str(spec))
        done = launches.hpcserve(*launch, timeout=180, check=False)
    assert done.returncode == 6, done.stdout + done.stderr
    assert "n3" in done.stderr
    assert "hint:" in done.stderr
    assert "READY" not in done.stdout
    wait_for(lambda: not cluster.slurm("squeue", "--noheader"), what="the job to end")


def test_launch_to_ready_costs_under_five_seconds_beyond_the_slowest_engine(
    run: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = run.events("job-started")[0]["t"]
    ready = run.events("ready")[0]["t"] - begun
    starts = {event["replica"]: event["seconds"] for event in run.events("engine-ready")}
    assert set(starts) == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    with capsys.disabled():
        print(f"\njob start to READY: {ready:.1f} s; slowest engine {max(starts.values()):.1f} s")
        for event in run.events():
            details = {key: value for key, value in event.items() if key not in ("t", "event")}
            print(f"  {event['t'] - begun:6.2f}  {event['event']:<15} {details}")
    assert ready - max(starts.values()) < 5
    assert run.events("rendezvous")[0]["transport"] == "mpi"
    proven = run.events("kv-path")
    assert proven and all(event["ok"] and event["bytes"] > 0 for event in proven)


def test_requests_go_through_both_legs_and_stop_ends_the_job(cluster: Testbed, run: Launched) -> None:
    assert run.request("/models")[1]["data"][0]["id"] == "fake"
    status, answer = complete(run)
    assert status == 200 and answer["usage"]["completion_tokens"] == 8
    assert read_stream(run, 1, 40).error is None
    assert {worker["role"] for worker in run.workers().values()} == {"prefill", "decode"}

    run.stop()
    run.wait_gone()
    for host in cluster.hosts:
        assert cluster.commands_of("hsuser", host.name) == []
    assert run.events("stopped")


@pytest.mark.parametrize("power_cut", [False, True], ids=["its processes are killed", "a power cut"])
def test_no_stream_breaks_when_a_node_dies(
    cluster: Testbed,
    run: Launched,
    unbroken: list[str],
    capsys: pytest.CaptureFixture[str],
    power_cut: bool,
) -> None:
    doomed = replica_away_from_head(run, "decode")
    tokens = 1000  # 20 s: the last stream has to begin before the first one ends, on a slow machine as well
    with ThreadPoolExecutor(50) as pool:
        streams: list[Future[Streamed]] = [pool.submit(read_stream, run, n, tokens) for n in range(50)]
        wait_for(
            lambda: in_flight(run) == 50, what="50 streams to run",
            state=lambda: f"{in_flight(run)} run, {sum(s.done() for s in streams)} are over; {run.logs()}",
        )  # fmt: skip
        on_doomed = run.workers()[doomed]["in_flight"]
        assert 0 < on_doomed < 50

        killed = time.time()
        cluster.kill_node(run.node_of(doomed), power_cut=power_cut)
        wait_for(lambda: worker_out(run, doomed), what=f"{doomed} to leave", state=run.logs)
        out_after = worker_out(run, doomed)[0]["t"] - killed
        for number in range(8):
            assert complete(run, f"new {number}")[0] == 200
        ends = [stream.result(timeout=90) for stream in streams]

        if not unbroken:
            whole = list(pool.map(lambda n: read_stream(run, n, tokens), range(50)))
            assert all(end.tokens == tokens for end in whole)
            unbroken += [end.text for end in whole]

    pause = max(ends, key=lambda end: end.longest_gap)
    with capsys.disabled():
        print(f"\n{doomed} out of rotation after {out_after:.1f} s; {on_doomed} of 50 streams ran there;")
        print(f"longest pause of any stream {pause.longest_gap:.2f} s,", end=" ")
        print(f"beginning {pause.gap_began - killed:+.1f} s from the kill")
    assert [end.error for end in ends] == [None] * 50
    assert [end.text for end in ends] == unbroken
    assert doomed not in in_rotation(run)
    assert cluster.slurm("squeue", "--noheader", "--jobs", run.job_id, "--format=%T").strip() == "RUNNING"


def test_a_job_whose_head_node_dies_gives_its_other_nodes_back(cluster: Testbed, run: Launched) -> None:
    """Slurm takes the node out of the job and keeps the job, without anybody in it."""
    head = json.loads((run.run_dir / "roster.json").read_text())["ranks"][0]["node"]
    cluster.kill_node(head)
    cluster.revive_node(head)
    job = cluster.slurm("scontrol", "show", "job", "--oneliner", run.job_id)
    assert "JobState=RUNNING" in job and f"BatchHost={head}" in job
    wait_for(run.gone, seconds=HEAD_LOST + DEADLINE, what="the job to end", state=run.logs)
    [failed] = run.events("failed")
    assert failed["message"] == f"the head node {head} died"
    cluster.wait_until_idle()


def test_an_engine_that_crashes_comes_back_by_itself(run: Launched) -> None:
    before = run.workers()["decode-0"]
    run.fail_engine("decode-0", {"mode": "crash"})
    wait_for(lambda: worker_out(run, "decode-0"), what="decode-0 to leave", state=run.logs)
    assert complete(run)[0] == 200  # the other decode engine answers
    wait_for(lambda: "decode-0" in in_rotation(run), what="decode-0 to return", state=run.logs)
    after = run.workers()["decode-0"]
    assert after["generation"] > before["generation"]
    died = [event for event in run.events("engine-died") if event["replica"] == "decode-0"]
    assert len(died) == 1
    for number in range(8):
        assert complete(run, f"again {number}")[0] == 200


@pytest.mark.timeout(240)
def test_another_user_reads_nothing_and_is_refused_without_the_key(cluster: Testbed, run: Launched) -> None:
    for path in (
        run.run_dir,
        run.run_dir / "run.json",
        run.run_dir / "secrets" / "api-key",
        run.run_dir / "logs",
    ):
        shown = cluster.as_user("hsother", ["sh", "-c", f"cat {path} || ls {path}"], check=False)
        assert shown.returncode != 0 and shown.stdout == "", path

    head = json.loads((run.run_dir / "head.json").read_text())
    controller = f"http://{head['address']}:{head['port']}/status"
    engines = [f"{worker['url']}/v1/models" for worker in run.workers().values()]
    for url in (f"{run.url}/models", controller, *engines):
        for key in ("", "hs-wrong"):
            assert requests.get(url, headers=bearer(key), timeout=20).status_code == 401, url


def test_no_secret_is_seen_in_ps_or_scontrol_or_logs(cluster: Testbed, run: Launched) -> None:
    assert complete(run)[0] == 200
    secrets = (run.api_key, run.job_key)
    places = {
        "ps": cluster.as_user("hsother", ["ps", "-ww", "-e", "-o", "args"]).stdout,
        "scontrol show job": cluster.slurm("scontrol", "show", "job", "-dd", run.job_id),
        "scontrol show step": cluster.slurm("scontrol", "show", "step", run.job_id),
        "scontrol write batch_script": cluster.slurm("scontrol", "write", "batch_script", run.job_id, "-"),
        "launch's answer": json.dumps(run.answer),
    } | {path.name: path.read_text() for path in run.run_dir.rglob("*") if path.is_file()}
    places.pop("api-key")
    places.pop("job-key")
    assert "hpcserve.node" in places["ps"]
    for place, text in places.items():
        assert not any(secret in text for secret in secrets), place
    for name in ("api-key", "job-key"):
        assert (run.run_dir / "secrets" / name).stat().st_mode & 0o777 == 0o600


def in_flight(run: Launched) -> int:
    """Streams that decode engines are working on."""
    return sum(worker["in_flight"] for worker in run.workers().values() if worker["role"] == "decode")


def in_rotation(run: Launched) -> set[str]:
    return {replica["name"] for replica in run.controller()["replicas"] if replica["in_rotation"]}


def worker_out(run: Launched, replica: str) -> list[dict[str, Any]]:
    return [event for event in run.events("worker-out") if event["replica"] == replica]
