"""One task of a replica that is a Slurm step: `python -m hpcserve.node.agent.step_task`, started by srun.

Each task takes its node's variables and becomes the engine's MPI launcher. The first task stays beside it and
watches the agent: when agent and srun were killed, nobody else would end the tasks, least of all those on
other nodes. In the first task the launcher runs `… step_task command FILE`: the engine's command with the job
key, from a file that only this user can read.

It runs once for each GPU of the replica, so it imports nothing else of hpcserve.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

MODULE = "hpcserve.node.agent.step_task"
VARIABLE = "HPCSERVE_STEP"
"""JSON: `launcher`, `lifeline`, `command` (paths), and for each node's name in `nodes` its variables."""
COMMAND = "command"
_LOOK = 0.2
_RETRY = 1.0
_TRIES = 30
"""Slurm's controller may be away for a moment."""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit status; `command` and all tasks but the first become another program."""
    if argv[:1] == [COMMAND]:
        _become_command(argv[1])
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
    if not first:
        os.execvp(program[0], program)
    return _watch(program, step["lifeline"], f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")


def _become_command(path: str) -> NoReturn:
    with open(path) as file:
        command: dict[str, Any] = json.load(file)
    os.execvpe(command["argv"][0], command["argv"], {**os.environ, **command["env"]})


def _watch(program: Sequence[str], lifeline: str, step: str) -> int:
    """Run the launcher for as long as somebody holds the lifeline."""
    # Not waiting for a writer: one that is gone would never come.
    pipe = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen(program) as launcher:
        while launcher.poll() is None:
            if select.select([pipe], [], [], _LOOK)[0] or not _held(pipe):
                _say(f"the agent is gone: ending the step {step}")
                _end(step)
                launcher.kill()
                return 1
        status = launcher.returncode
    return status if status >= 0 else 128 - status


def _held(pipe: int) -> bool:
    """Has somebody the other end open? Nothing is ever written."""
    try:
        return bool(os.read(pipe, 1))
    except BlockingIOError:
        return True


def _end(step: str) -> None:
    """Kill all tasks of the step, this one among them."""
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
