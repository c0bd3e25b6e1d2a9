"""When the job ends, as Slurm says: the batch environment of older versions does not carry it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping

_ASK = (
    ("squeue", "--noheader", "--format=%e", "--jobs={job}"),
    ("scontrol", "--oneliner", "show", "job", "{job}"),
)
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}")


def end_time(environ: Mapping[str, str]) -> float | None:
    """Unix time at which the job's walltime is over; None outside Slurm or without a limit."""
    told = environ.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal():
        return float(told)
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    for command in _ASK:
        program = shutil.which(command[0], path=environ.get("PATH"))
        if program is None:
            continue
        end = parse_end_time(_output([program, *(part.format(job=job) for part in command[1:])]))
        if end is not None:
            return end
    return None


def parse_end_time(text: str) -> float | None:
    """The end in `squeue --format=%e` or `scontrol show job` output, local time; None for `Unknown`."""
    found = re.search(r"EndTime=(\S+)", text)
    # One line for each component of a heterogeneous job; they end together.
    stamp = _TIME.fullmatch(found[1] if found else text.strip().partition("\n")[0])
    return time.mktime(time.strptime(stamp[0], "%Y-%m-%dT%H:%M:%S")) if stamp else None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        # A busy controller: the caller asks the next program, and warns when nobody knows.
        return ""
    return done.stdout
