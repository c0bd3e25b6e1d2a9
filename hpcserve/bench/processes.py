"""Processes a benchmark starts, and ends with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_END = 10.0


def environment() -> dict[str, str]:
    """This process's, in which this package is found wherever it lies, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def start(
    argv: Sequence[str], *, directory: Path, log: IO[bytes], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that `end` reaches its children; both outputs go to `log`."""
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=directory,
        env=environment() | dict(env or {}),
        start_new_session=True,
    )


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Ask all of them to end, then kill what is left: some peers leave children behind when only asked."""
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
