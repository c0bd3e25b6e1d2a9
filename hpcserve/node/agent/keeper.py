"""Sees to it that no engine outlives its agent, however the agent ends.

A small process holds one end of a pipe. The agent, or a task of an engine's Slurm step, tells it which
process groups it started; when the pipe closes, because the agent is gone, the keeper kills those groups and
removes its scratch directory. PR_SET_PDEATHSIG would reach an engine's first process only, and not the
workers below it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from ..process import signal_group
from .remains import hold, settle

_GROUP_END = 5.0
"""Seconds the kernel may take to clear the killed groups."""


class Keeper:
    """Start it before any thread or event loop: it forks. Raises OSError when it can't."""

    def __init__(self) -> None:
        reading, self._pipe = os.pipe()
        self._ended, ending = os.pipe()
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                # Twice: where Slurm finds a step's processes by their parents (proctrack/linuxproc), it would
                # kill the keeper with the agent, and miss what was started or lost its parent meanwhile.
                if os.fork() == 0:
                    os.close(self._pipe)
                    os.close(self._ended)
                    _keep(reading)
                failed = 0
            finally:
                os._exit(failed)
        os.close(reading)
        os.close(ending)
        if os.waitpid(child, 0)[1]:
            raise BlockingIOError(errno.EAGAIN, "no process can be started to end what this one leaves")

    def add(self, group: int) -> None:
        """`group` is to be killed when this process is gone."""
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Nobody is left in `group`; its number may be used again."""
        self._tell(f"-{group}\n")

    def sweep(self, directory: Path) -> None:
        """`directory` is to be removed when this process is gone."""
        self._tell(f"/{json.dumps(str(directory))}\n")

    def settle(self, lock: Path) -> None:
        """What `lock` names then is to be removed when this process is gone (`remains.py`)."""
        self._tell(f"={json.dumps(str(lock))}\n")

    def close(self) -> None:
        """End the keeper, which kills and removes what is still registered."""
        os.close(self._pipe)
        # Nothing is ever written: this returns when the keeper has ended.
        os.read(self._ended, 1)
        os.close(self._ended)

    def _tell(self, line: str) -> None:
        # A keeper that somebody killed must not take the agent with it.
        with suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())


def _keep(pipe: int) -> None:
    """Never returns."""
    groups: set[int] = set()
    directories: list[str] = []
    locks: list[Path] = []
    try:
        # Out of the agent's session: what is sent to the agent's group must not end the keeper first.
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with os.fdopen(pipe) as lines:
            for line in lines:
                if line[0] == "+":
                    groups.add(int(line[1:]))
                elif line[0] == "-":
                    groups.discard(int(line[1:]))
                elif line[0] == "/":
                    directories.append(json.loads(line[1:]))
                else:
                    locks.append(Path(json.loads(line[1:])))
                    # Without it, another agent may remove the same, once this one's is gone.
                    with suppress(OSError):
                        hold(locks[-1])
    finally:
        try:
            _end(groups)
            # The last one first, which is the memory's: a disk takes its time.
            for lock in reversed(locks):
                with suppress(OSError):
                    settle(lock)
            for directory in directories:
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os._exit(0)


def _end(groups: set[int]) -> None:
    """Kill them: a process that still lives could make a file again."""
    last = time.monotonic() + _GROUP_END
    while any([signal_group(group, signal.SIGKILL) for group in groups]) and time.monotonic() < last:
        time.sleep(0.02)
