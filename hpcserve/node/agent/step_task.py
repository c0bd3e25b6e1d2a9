"""One task of a replica that is a Slurm step: `python -m hpcserve.node.agent.step_task`, started by srun.

Each task takes its node's variables, runs the engine's MPI launcher, and ends all that the launcher started
when that ends, when Slurm ends the task, or when the task is killed. Slurm does so itself only where it keeps
a step's processes in a cgroup; elsewhere a process whose parent has ended is no longer one of the step's.

It also watches the agent of its node, which holds a pipe in the task's directory: the end of a task must not
depend on srun and Slurm's daemons alone. When the replica's agent and srun were killed, the first task asks
Slurm to end the others. In the first task the launcher runs `… step_task command FILE`: the engine's command
with the job key, from a file that only this user can read.

It runs once for each GPU of the replica, so it imports little of hpcserve.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..process import signal_group
from .keeper import Keeper

MODULE = "hpcserve.node.agent.step_task"
VARIABLE = "HPCSERVE_STEP"
"""JSON: `launcher`, `command` (paths), `head`, and for each node's name in `nodes` its variables."""
COMMAND = "command"
LIFELINE = "lifeline"
"""Below $TMPDIR: a named pipe that is held open for as long as the task is to run."""
_GRACE = 10.0
"""Seconds that tasks on a further node give the replica's head to end the step, after their agent has ended:
all agents are told to stop, and not at once."""
_LOOK = 0.2
_GROUP_END = 5.0
"""Seconds the kernel may take to clear a killed process group."""
_RETRY = 1.0
_TRIES = 30
"""Slurm's controller may be away for a moment."""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit status."""
    if argv[:1] == [COMMAND]:
        return _command(argv[1])
    step = json.loads(environ[VARIABLE])
    node, first = environ["SLURMD_NODENAME"], environ["SLURM_PROCID"] == "0"
    if node not in step["nodes"] or (first and node != step["head"]):
        print(f"error: {node} is not this task's node: {step['head']} comes first", file=sys.stderr)
        return 1
    os.environ.update(step["nodes"][node])
    del os.environ[VARIABLE]
    os.chdir(os.environ["TMPDIR"])
    program = step["launcher"], sys.executable, "-m", MODULE, COMMAND, step["command"]
    if shutil.which(program[0]) is None:
        print(f"error: {node} has no {program[0]} on its PATH", file=sys.stderr)
        return 127
    status = _run(program, 0.0 if node == step["head"] else _GRACE)
    if status is None and first:
        _end(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")
    return 1 if status is None else status


def _command(path: str) -> int:
    """Run the engine's command. When it fails, the launcher and its rank are killed, and so the step: they
    would wait for it for ever."""
    with open(path) as file:
        command: dict[str, Any] = json.load(file)
    status = subprocess.run(command["argv"], env={**os.environ, **command["env"]}).returncode
    # SIGTERM comes from Slurm, which ends the ranks as well.
    if status not in (0, -signal.SIGTERM):
        _say(f"error: the replica's server ended with status {status}")
        # The launcher's group, which is this process's.
        os.killpg(0, signal.SIGKILL)
    return status


def _run(program: Sequence[str], grace: float) -> int | None:
    """The launcher's exit status, once all that it started is gone. It is ended when Slurm ends the task, and
    `grace` seconds after the agent has ended. None: the agent is gone."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    keeper = Keeper()
    pipe = _open(LIFELINE)
    # A group of its own. The child itself tells the keeper, so it can start nothing that is not known.
    launcher = subprocess.Popen(program, process_group=0, preexec_fn=lambda: keeper.add(os.getpid()))
    gone: float | None = None
    while launcher.poll() is None and not told:
        if not _held(pipe):
            gone = gone or time.monotonic()
            if time.monotonic() - gone >= grace:
                break
        time.sleep(_LOOK)
    # At once: ranks die of SIGTERM, and a server may wait for their answers then. What there was to finish,
    # the router has let finish before.
    deadline = time.monotonic() + _GROUP_END
    while signal_group(launcher.pid, signal.SIGKILL) and time.monotonic() < deadline:
        launcher.poll()
        time.sleep(0.02)
    keeper.close()
    if told:
        return 128 + told[0]
    if not _held(pipe):
        return None
    status = launcher.returncode if launcher.returncode is not None else -signal.SIGKILL
    return status if status >= 0 else 128 - status


def _open(lifeline: str) -> int:
    """An end of the lifeline. If that is gone with the agent's directory, of a pipe that nobody holds."""
    try:
        # Not waiting for a writer: one that is gone would never come.
        return os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        reading, writing = os.pipe()
        os.close(writing)
        os.set_blocking(reading, False)
        return reading


def _held(pipe: int) -> bool:
    """Has somebody the other end open? Nothing is ever written."""
    try:
        return bool(os.read(pipe, 1))
    except BlockingIOError:
        return True


def _end(step: str) -> None:
    """Kill all tasks of the step, this one among them."""
    _say(f"the agent is gone: ending the step {step}")
    for _ in range(_TRIES):
        try:
            subprocess.run(["scancel", "--signal=KILL", step], check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            _say(f"warning: the step {step} is not ended yet: {error}")
        time.sleep(_RETRY)


def _say(text: str) -> None:
    # Perhaps nobody reads it any more.
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
