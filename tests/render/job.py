"""Runs rendered job scripts with stand-ins for the programs they call."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.patience import DEADLINE

STUB = Path(__file__).with_name("stub.sh")
"""Seconds after which a script is called stuck; nothing waits for it to pass."""


@dataclass(frozen=True)
class Call:
    name: str
    program: str
    rank: str
    binds: str
    argv: list[str]


class Job:
    """A job script in a directory of its own. `programs` says how each program behaves."""

    def __init__(self, root: Path, script: str, run_dir: Path, programs: dict[str, str]) -> None:
        self.stubs, self.run_dir = root / "stubs", run_dir
        self.bin = root / "bin"
        for directory in (self.stubs, self.bin, run_dir / "logs"):
            directory.mkdir(parents=True)
        for name in ("srun", "mpirun", "apptainer", "squeue", "python"):
            (self.bin / name).symlink_to(STUB)
        for program, behaviour in ({"mpi-list": "say pmix"} | programs).items():
            (self.stubs / program).write_text(behaviour + "\n")
        self.script = run_dir / "job.sh"
        self.script.write_text(script)
        self._process: subprocess.Popen[str] | None = None
        self.status: int | None = None
        self.errors = ""

    def start(self, **environ: str) -> Job:
        self._process = subprocess.Popen(
            ["bash", str(self.script)],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "STUBS": str(self.stubs),
                "SLURM_JOB_ID": "7",
                "SLURMD_NODENAME": "n1",
                **environ,
            },
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def wait(self) -> int:
        assert self._process is not None
        try:
            _, self.errors = self._process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        self.status = self._process.returncode
        return self.status

    def run(self, **environ: str) -> Job:
        self.start(**environ).wait()
        return self

    def term(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def until(self, condition: Callable[[], bool]) -> None:
        assert self._process is not None
        end = time.monotonic() + DEADLINE
        while not condition():
            assert self._process.poll() is None, self._process.communicate()[1]
            assert time.monotonic() < end, "the condition never came true"
            time.sleep(0.02)

    def until_up(self, *programs: str) -> None:
        self.until(lambda: set(programs) <= set(self.lines("up")))

    def lines(self, file: str) -> list[str]:
        path = self.stubs / file
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[Call]:
        words = [shlex.split(line) for line in self.lines("calls")]
        return [Call(w[0], w[1], w[2][5:], w[3][6:], w[4:]) for w in words]

    @property
    def programs(self) -> list[str]:
        return [call.program for call in self.calls]

    def call(self, program: str) -> Call:
        (found,) = [call for call in self.calls if call.program == program]
        return found

    def left_over(self) -> list[str]:
        """Stand-ins that still run."""
        alive = []
        for line in self.lines("pids"):
            pid = int(line.split()[0])
            if Path(f"/proc/{pid}").exists() and str(STUB.name) in _command(pid):
                alive.append(line)
        return alive


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
