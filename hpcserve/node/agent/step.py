"""A replica over several nodes as one MPI program: what its Slurm step is told, and how it ends.

The agent starts srun, and srun the tasks (`step_task.py`). What they need goes by srun's environment, but for
the engine's command: that has the job key, and stays in a file on the replica's head node.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineError
from ...rundir.atomic import storage_error, write_text
from . import step_task
from .log_pump import LogPump
from .running_engine import RunningEngine

_COMMAND = "command.json"
_ORDERLY = 10.0
"""Seconds that srun gets in any case: it ends its tasks on all nodes before itself."""
_SPLITS = re.compile(r"[^\w@%+=:,./~-]")
"""What a shell takes apart, or for something else, in a word without quotes."""


class NodeGone(EngineError):
    """A node of the replica has left since it was last looked for."""


def hold_lifeline(scratch: Path) -> int:
    """The lifeline of tasks whose directory this is, held open by what is returned. Raises StorageError."""
    path = scratch / step_task.LIFELINE
    try:
        # A new one each time: tasks of the last start must not hold on to this one's.
        path.unlink(missing_ok=True)
        os.mkfifo(path, mode=0o600)
        # For reading as well, or it would wait for a reader.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise storage_error(error, "make a pipe") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    launcher: str
    """Each task runs it; it runs the rest of its words in the first one."""
    argv: tuple[str, ...]
    """The engine's command."""
    secrets: Mapping[str, str]
    """Variables for that command alone."""
    variables: Mapping[str, Mapping[str, str]]
    """By the node's name for Slurm; the replica's head is first."""
    scratch: Path
    name: str

    def prepare(self) -> int:
        """Write what the first task reads, and return the lifeline: while this process holds it open, the
        step runs. Raises JobError."""
        for word in (sys.executable, str(self.scratch)):
            if _SPLITS.search(word):
                raise EngineError(
                    f"{self.name}: {self.launcher} can't start a program below {word!r}: it splits its "
                    "command at spaces and expands wildcards",
                    hint="use paths of letters, digits, `.`, `_` and `-` for Python and `storage.node_local`",
                )
        command = {"argv": self.argv, "env": dict(self.secrets)}
        write_text(self.scratch / _COMMAND, json.dumps(command), mode=0o600)
        return hold_lifeline(self.scratch)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What srun's tasks have in common, beside the rest of `environ`."""
        step = {
            "launcher": self.launcher,
            "command": str(self.scratch / _COMMAND),
            "head": next(iter(self.variables)),
            "nodes": {node: dict(variables) for node, variables in self.variables.items()},
        }
        # The launcher is beside this Python, and starts workers with the first `python3` that it finds.
        path = os.pathsep.join((os.path.dirname(sys.executable), environ.get("PATH", os.defpath)))
        return {step_task.VARIABLE: json.dumps(step), "PATH": path, "PYTHONUNBUFFERED": "1"}

    def task(self) -> tuple[str, ...]:
        """The program of each task."""
        return (sys.executable, "-m", step_task.MODULE)


class RunningStep(RunningEngine):
    """srun, and with it all tasks of the step."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        url: str | None,
        ports: Mapping[str, int],
        pump: LogPump,
        lifeline: int,
    ) -> None:
        super().__init__(process, url=url, ports=ports, pump=pump)
        self._lifeline = lifeline

    async def end(self, deadline: Callable[[], float]) -> int:
        """srun answers SIGTERM by killing its tasks, and waits for them. Were it killed itself, the tasks on
        this node would notice that the lifeline is closed, and the first one end the step by its number."""
        least = asyncio.get_running_loop().time() + _ORDERLY
        try:
            return await super().end(lambda: max(deadline(), least))
        finally:
            os.close(self._lifeline)
