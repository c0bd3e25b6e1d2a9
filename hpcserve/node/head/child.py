"""Programs that the head starts: their output goes to a log of the run, their life is the head's business."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...errors import JobError
from ...rundir.atomic import file_mode, storage_error


def start_child(
    command: Sequence[str], log: Path, what: str, *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """`what` is its name in errors. Raises StorageError without a log, and JobError."""
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, file_mode(log.parent))
    except OSError as error:
        raise storage_error(error, f"write the log of {what}") from error
    try:
        # A session of its own: signals to the job's group are for the head, which tells its children itself.
        return subprocess.Popen(command, stdin=stdin, stdout=output, stderr=output, start_new_session=True)
    except OSError as error:
        raise JobError(f"can't start {what}: {error.strerror}") from error
    finally:
        os.close(output)
