"""Daemons of the test cluster, each remembered with its start time so that no stranger is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import paths


def started_at(pid: int) -> str | None:
    """The kernel's start time of a process, which tells it from a later one with the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def start(name: str, argv: list[str], env: Mapping[str, str]) -> None:
    """Start a daemon that outlives this process; its output goes to the log directory."""
    log = str(paths.LOGS / f"{name}.out")
    # Not subprocess.Popen: it complains about children that live on.
    pid = os.posix_spawnp(
        "env",
        ["env", "--chdir=/", *argv],
        dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    (paths.PIDS / name).write_text(f"{pid} {started_at(pid)}\n")


def running(name: str) -> int | None:
    """The pid of the daemon started as `name`, if it still lives."""
    try:
        pid, begun = (paths.PIDS / name).read_text().split()
    except FileNotFoundError:
        return None
    return int(pid) if started_at(int(pid)) == begun else None


def stop(name: str) -> None:
    pid = running(name)
    if pid is not None:
        kill([pid])
    (paths.PIDS / name).unlink(missing_ok=True)


def kill(pids: Iterable[int], *, seconds: float = 10) -> None:
    """SIGKILL these processes and wait until they are gone."""
    waiting = {pid: started_at(pid) for pid in pids}
    for pid in waiting:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + seconds
    while any(begun is not None and started_at(pid) == begun for pid, begun in waiting.items()):
        _reap(waiting)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(waiting)} do not die")
        time.sleep(0.02)
    _reap(waiting)


def _reap(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue  # not ours: its own parent, or init, reaps it
