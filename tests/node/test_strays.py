"""What an engine started in a session of its own, as Apptainer does with its mounts, ends with the engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from hpcserve.node.agent.engine_launch import RunningEngine
from hpcserve.node.agent.log_pump import LogPump

from .jobs import wait_for

PARENT = """
import subprocess, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


class NoPump:
    def finish(self, _: float) -> None:
        """There is no log."""


@pytest.mark.parametrize("grace", [0.0, 0.2], ids=["killed at once", "deaf to SIGTERM"])
def test_a_child_outside_the_group_ends_with_the_engine(grace: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    engine = RunningEngine(process, url=None, ports={}, pump=cast(LogPump, NoPump()))
    assert asyncio.run(_end(engine, grace)) == -9
    wait_for(lambda: not _lives(child), "the child to end")
    process.stdout.close()


async def _end(engine: RunningEngine, grace: float) -> int:
    deadline = asyncio.get_running_loop().time() + grace
    return await engine.end(lambda: deadline)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
