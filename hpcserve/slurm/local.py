"""Site `local`: the job script as a detached process on this machine, without Slurm and root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import SlurmError
from ..rundir.atomic import storage_error
from .sbatch import job_environment
from .scheduler import JobState

_KILL_WAIT = 5.0
"""Seconds a forced job has between SIGTERM and SIGKILL."""


class LocalScheduler:
    """Job ids are `local-PID-START`: START, the kernel's start time, tells a recycled PID apart."""

    def submit(self, script: Path, run_dir: Path, *, after: str | None = None) -> str:
        if after is not None:
            raise SlurmError("this machine has no queue for a job to wait in", hint="use a site with Slurm")
        log = run_dir / "logs" / "job.log"
        try:
            with log.open("ab") as output:
                # setsid: no terminal, so Ctrl-C and a closed ssh session do not reach it.
                process = subprocess.Popen(
                    ["bash", str(script)],
                    cwd=run_dir,
                    env=job_environment(os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise SlurmError(f"can't start the job: {error}", hint="`--site local` needs bash") from error
        except OSError as error:
            raise storage_error(error, "start the job") from error
        start = _stat(process.pid)
        process.returncode = 0  # it is meant to outlive us: no warning that it still runs
        return f"local-{process.pid}-{start.started if start else 0}"

    def state(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        return {job: self._state(job) for job in job_ids}

    def _state(self, job_id: str) -> JobState:
        pid, started = _split(job_id)
        reap(pid)
        leader = _stat(pid)
        running = leader is not None and leader.started == started and leader.state != "Z"
        begin = _boot_time() + started / os.sysconf("SC_CLK_TCK")
        return JobState(
            job_id=job_id,
            state="RUNNING" if running else "GONE",
            nodes=(os.uname().nodename,) if running else (),
            start=begin,
        )

    def cancel(self, job_id: str, *, force: bool) -> None:
        pid, started = _split(job_id)
        if not force:
            leader = _stat(pid)
            if leader is not None and leader.started == started and leader.state != "Z":
                _signal(pid, signal.SIGTERM)
            return
        members = job_processes(pid, started)
        for member in members:
            _signal(member, signal.SIGTERM)
        deadline = time.monotonic() + _KILL_WAIT
        while job_processes(pid, started) and time.monotonic() < deadline:
            time.sleep(0.05)
        # Children of processes that are gone by now are no longer found below the leader.
        for member, born in (members | job_processes(pid, started)).items():
            now = _stat(member)
            if now is not None and now.started == born:
                _signal(member, signal.SIGKILL)


class _Stat:
    """The fields of /proc/PID/stat that matter here (`man 5 proc`)."""

    __slots__ = ("parent", "session", "started", "state")

    def __init__(self, text: str) -> None:
        # The second field is the program's name in parentheses, and may hold spaces and ")".
        fields = text[text.rindex(")") + 2 :].split()
        self.state = fields[0]
        self.parent = int(fields[1])
        self.session = int(fields[3])
        self.started = int(fields[19])


def _stat(pid: int) -> _Stat | None:
    try:
        return _Stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def job_processes(pid: int, started: int) -> dict[int, int]:
    """Live processes of a job, as pid -> start time: its session, and all descendants of its leader."""
    leader = _stat(pid)
    if leader is not None and leader.started != started:
        return {}  # the PID belongs to somebody else; the kernel reuses it only once the session is empty
    everyone = dict(_everyone())
    found = {member for member, stat in everyone.items() if member == pid or stat.session == pid}
    grew = bool(found)
    while grew:
        below = {member for member, stat in everyone.items() if stat.parent in found} - found
        found |= below
        grew = bool(below)
    return {member: everyone[member].started for member in found if everyone[member].state != "Z"}


def _everyone() -> Iterator[tuple[int, _Stat]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            stat = _stat(int(entry))
            if stat is not None:
                yield int(entry), stat


def reap(pid: int) -> None:
    """Collect the job if it is our own child, so that it does not stay as a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _split(job_id: str) -> tuple[int, int]:
    parts = job_id.split("-")
    if len(parts) != 3 or parts[0] != "local" or not (parts[1].isdigit() and parts[2].isdigit()):
        raise SlurmError(f"{job_id!r} is not the id of a local job")
    return int(parts[1]), int(parts[2])


def _boot_time() -> float:
    for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
