"""Rank 0's word that the preflight is over: one line, `ATTEMPT STATUS`, which the job script reads as well.

Slurm's own status of the step does not tell it: there, a task that was killed is above any verdict. The file
is gone at each start of the job.
"""

from __future__ import annotations

import os
from contextlib import suppress

from ...rundir.atomic import storage_error, write_text
from ...rundir.layout import RunDir

_NAME = "preflight-over"


def tell_over(run: RunDir, attempt: str, status: int) -> None:
    """`status` is that of this program on rank 0. Raises StorageError."""
    directory = run.path / "rendezvous"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise storage_error(error, "make a directory") from error
    write_text(directory / _NAME, f"{attempt} {status}\n")


def is_over(run: RunDir, attempt: str) -> bool:
    """Has rank 0 of this attempt said so?"""
    directory = run.path / "rendezvous"
    # Not there yet, or just replaced on NFS: whoever asks comes again.
    with suppress(OSError):
        os.listdir(directory)  # makes an NFS client notice new files
        return (directory / _NAME).read_text(encoding="ascii").split()[:1] == [attempt]
    return False
