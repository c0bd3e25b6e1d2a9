"""What each job did for a batch: written at its end, for the report and for those who come after it."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..errors import HpcserveError, StorageError
from ..rundir.atomic import read_json
from ..rundir.events import read_events
from ..rundir.layout import RunDir
from . import disk
from .layout import BatchDir
from .progress import Progress

STUCK = 2
"""Jobs one after the other without a single result: the next one would not get any either."""


class Part(msgspec.Struct, frozen=True):
    """One driver's part. Times are Unix seconds."""

    member: str
    slurm_job: str | None
    gpus: int
    """Of its job; 0 on an endpoint that others use as well."""
    job_began: float
    """When the job did, or the driver where that is not known."""
    began: float
    first_result: float | None
    tail: float | None
    """When there was no more row to begin with."""
    last_result: float | None
    ended: float
    how: str
    """`complete`, `others`, `more`, or the error it ended with."""
    results: int
    errors: int
    prompt_tokens: int
    output_tokens: int
    cpu_seconds: float
    """Of the driver's process."""
    memory_bytes: int
    """Of the driver's process, at most, with the files it has mapped."""
    attempts: dict[str, int]
    finish_reasons: dict[str, int]
    retries: dict[str, int]


def note(
    directory: BatchDir, member: str, slurm_job: str | None, progress: Progress, how: str, endpoint: Path
) -> None:
    """Raises StorageError."""
    gpus, job_began = _job(endpoint.parent) if slurm_job is not None else (0, None)
    used = resource.getrusage(resource.RUSAGE_SELF)
    part = Part(
        member=member,
        slurm_job=slurm_job,
        gpus=gpus,
        job_began=job_began or progress.began,
        began=progress.began,
        first_result=progress.first_result,
        tail=progress.tail,
        last_result=progress.last_result,
        ended=time.time(),
        how=how,
        results=progress.results,
        errors=progress.errors,
        prompt_tokens=progress.prompt_tokens,
        output_tokens=progress.output_tokens,
        cpu_seconds=round(used.ru_utime + used.ru_stime, 2),
        memory_bytes=used.ru_maxrss * 1024,
        attempts={str(count): rows for count, rows in sorted(progress.attempts.items())},
        finish_reasons=dict(progress.finish_reasons),
        retries=dict(progress.retries),
    )
    disk.write_whole(directory.history / f"{member}.json", msgspec.json.encode(part))


def read(directory: BatchDir) -> list[Part]:
    """All parts that were noted, the oldest first. Raises StorageError."""
    found = []
    for path in directory.history.glob("*.json"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Part))
        except OSError as error:
            raise disk.failed(error, "read") from error
        except msgspec.DecodeError as error:
            raise StorageError(f"{path} is damaged: {error}", hint="remove that file") from error
    return sorted(found, key=lambda part: part.ended)


def stuck(parts: Sequence[Part], *, since: Path) -> bool:
    """Did the last jobs get nothing done? Those before `since` was written don't count."""
    try:
        asked = since.stat().st_mtime
    except OSError:
        asked = 0.0
    last = [part for part in parts if part.ended > asked][-STUCK:]
    return len(last) == STUCK and not any(part.results for part in last)


def _job(run: Path) -> tuple[int, float | None]:
    """GPUs and begin of the job whose run directory this is; nothing where it can't be read."""
    try:
        plan = read_json(RunDir(run).plan)
        gpus = plan["nodes"] * plan["slots_per_node"] if plan["device"] == "cuda" else 0
        starts = [
            event["t"] for event, _ in read_events(RunDir(run).events) if event["event"] == "job-started"
        ]
        return gpus, starts[-1] if starts else None
    except (OSError, HpcserveError, KeyError):
        return 0, None
