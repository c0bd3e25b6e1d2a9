"""`ls`, `status`, `logs`, `chat` and `stop` when something around them does not work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcserve import control
from hpcserve.cli.chat import _deltas
from hpcserve.errors import RunError
from hpcserve.rundir.logs import Tail

from .conftest import World
from .jobs import answering, becomes_ready, head, secret, submit, writes, writes_events


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_TIMEOUT", 2.0)


def test_the_table_has_a_url_and_only_while_something_is_missing_a_progress(world: World) -> None:
    submit(world, job=becomes_ready())
    replica = {"name": "decode-0", "state": "ready", "node": "n3", "url": "http://10.0.0.3:1",
               "progress": "weights 4/4", "in_rotation": True}  # fmt: skip
    loading = {**replica, "name": "decode-1", "state": "loading", "progress": "weights 2/4",
               "in_rotation": False}  # fmt: skip
    with answering(secret(world, "job-key"), {"replicas": [replica]}) as (port, _):
        head(world, port)
        ready = world("status", "eval").out
    with answering(secret(world, "job-key"), {"replicas": [replica, loading]}) as (port, _):
        head(world, port)
        starting = world("status", "eval").out
    assert "RESTARTS  URL\n" in ready
    assert "weights" not in ready
    assert "URL                PROGRESS\n" in starting
    assert "weights 2/4" in starting
    assert "weights 4/4" not in starting


def test_stop_works_through_the_controller_when_slurm_is_down(world: World) -> None:
    submit(world, job=becomes_ready())
    world.slurm.is_down()
    with answering(secret(world, "job-key")) as (port, asked):
        head(world, port)
        first = world("stop", "eval", "--wait", "0")
        second = world("stop", "eval", "--wait", "0")
    assert (first.status, second.status) == (0, 0)
    assert asked == ["POST /drain", "POST /stop"]
    assert world("stop", "eval", "--wait", "0").status == 5


def test_stop_works_on_a_full_disk(world: World) -> None:
    submit(world, job=becomes_ready())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with answering(secret(world, "job-key")) as (port, asked):
        head(world, port)
        world.monkeypatch.setattr(os, "fsync", full)
        assert world("stop", "eval", "--wait", "0").status == 0
        assert world("stop", "eval", "--wait", "0").status == 0
    # The controller itself drains at the first and forces at the second.
    assert asked == ["POST /stop", "POST /stop"]


def test_a_job_that_ends_without_a_word_is_explained_by_its_script(world: World) -> None:
    said = "warning: x\nerror: the rendezvous failed with status 75; see logs\n"
    submit(world, job=writes("logs/job.log", said), shows="42|FAILED|1|2|n1|NonZeroExitCode")
    for answer in (world("status", "eval"), world("ls")):
        assert "the rendezvous failed with status 75" in answer.out


def test_a_head_that_was_told_to_end_by_its_script_has_not_been_stopped(world: World) -> None:
    submit(
        world,
        job=writes("logs/agent-0.log", "error: can't write /scratch\n\nhint: choose another\n")
        + writes("logs/job.log", "error: all agents are gone; see logs\n")
        + writes("roster.json", "{}")
        + writes_events({"event": "stopped", "reason": "signal SIGTERM"}),
    )
    assert "is failed: can't write /scratch" in world("status", "eval").out


def test_an_event_that_a_full_disk_cut_hides_no_other(world: World) -> None:
    cut = 'echo \'{"t": 1, "event": "worker-in", "rep\' >> "$run/events.jsonl"\n'
    submit(world, job=cut + becomes_ready())
    assert "is ready" in world("status", "eval").out


def test_a_stream_that_ends_early_or_makes_no_sense_is_an_error() -> None:
    piece = b'data: {"choices": [{"delta": {"content": "The"}}]}\n'
    for lines in ([piece], [piece, b"data: {\n"], [piece, b'data: {"choices": [{}]}\n'],
                  [piece, b'data: {"error": {"message": "lost"}}\n']):  # fmt: skip
        answer = _deltas(iter(lines))
        assert next(answer) == "The"
        with pytest.raises(RunError, match=r"broke off|something else"):
            next(answer)
    assert list(_deltas(iter([piece, b"data: [DONE]\n"]))) == ["The"]


def test_following_goes_on_over_a_rotation_in_the_middle_of_a_line(tmp_path: Path) -> None:
    log = tmp_path / "decode-0.n1.log"
    log.write_text("one\ntw")
    tail = Tail(log)
    assert tail.lines() == ["one"]
    with log.open("a") as file:
        file.write("o\nthr")
    log.rename(tmp_path / "decode-0.n1.log.1")
    log.write_text("ee\nfour\n")
    assert tail.lines() == ["two", "three", "four"]
    assert Tail(log).lines() == ["one", "two", "three", "four"]


def test_stdout_of_another_encoding_is_no_traceback(world: World) -> None:
    submit(world, job=writes_events({"event": "failed", "message": "n1 → n2: no route", "exit_code": 6}))
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "hpcserve", "status", "eval"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "n1 ? n2: no route" in done.stdout


def test_a_squeue_that_prints_no_jobs_does_not_end_a_run(world: World) -> None:
    submit(world)
    world.slurm.says("squeue", "Welcome! Maintenance is on Friday.\n")
    answer = world("ls")
    assert "unknown" in answer.out
    assert "Welcome!" in answer.err
