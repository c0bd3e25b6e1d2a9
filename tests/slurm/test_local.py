from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcserve.errors import SlurmError
from hpcserve.slurm import local
from hpcserve.slurm.local import LocalScheduler, job_processes
from tests.patience import DEADLINE


def until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.02)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def submit(run_dir: Path) -> Iterator[Callable[[str], str]]:
    jobs: list[str] = []

    def submit(script: str) -> str:
        (run_dir / "job.sh").write_text(script)
        jobs.append(LocalScheduler().submit(run_dir / "job.sh", run_dir))
        return jobs[-1]

    yield submit
    for job in jobs:
        LocalScheduler().cancel(job, force=True)


def over(job: str) -> bool:
    return LocalScheduler().state([job])[job].over


def test_a_job_runs_detached_and_writes_its_log(run_dir: Path, submit: Callable[[str], str]) -> None:
    job = submit("echo hello from $$; ps -o sid= -p $$ | tr -d ' '\n")
    until(lambda: over(job))
    pid = job.split("-")[1]
    assert (run_dir / "logs/job.log").read_text().split() == ["hello", "from", pid, pid]


def test_a_running_job_is_running_since_its_start(submit: Callable[[str], str]) -> None:
    job = submit("sleep 60\n")
    state = LocalScheduler().state([job])[job]
    assert state.phase == "running"
    assert state.start == pytest.approx(time.time(), abs=30)


def test_a_first_stop_lets_the_script_finish_its_work(run_dir: Path, submit: Callable[[str], str]) -> None:
    job = submit("trap 'echo draining; exit 0' TERM\necho up\nwhile :; do sleep 0.05; done\n")
    log = run_dir / "logs/job.log"
    until(lambda: "up" in log.read_text())
    LocalScheduler().cancel(job, force=False)
    until(lambda: over(job))
    assert "draining" in log.read_text()


def test_force_ends_a_script_that_ignores_sigterm_and_what_it_started(
    run_dir: Path, submit: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_KILL_WAIT", 0.3)
    # setsid: an engine in a session of its own is still a descendant.
    job = submit(
        "trap '' TERM\nsetsid sleep 300 & echo child $!\n(trap '' TERM; sleep 301) &\necho up\n"
        "while :; do sleep 0.05; done\n"
    )
    log = run_dir / "logs/job.log"
    until(lambda: "up" in log.read_text())
    _, pid, started = job.split("-")
    members = job_processes(int(pid), int(started))
    assert len(members) >= 3
    LocalScheduler().cancel(job, force=True)
    until(lambda: over(job))
    until(lambda: not any(_alive(member) for member in members))


def test_a_recycled_pid_is_never_signalled(submit: Callable[[str], str]) -> None:
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        job = f"local-{stranger.pid}-1"
        assert over(job)
        LocalScheduler().cancel(job, force=False)
        LocalScheduler().cancel(job, force=True)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_id_of_a_slurm_job_is_refused() -> None:
    with pytest.raises(SlurmError, match="not the id of a local job"):
        LocalScheduler().state(["4711"])


def _alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text[text.rindex(")") + 2] != "Z" and os.path.exists(f"/proc/{pid}")
