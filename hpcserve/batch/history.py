"""What each job did for a batch: written at its end, for the report and for those who come after it."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..errors import HpcserveError, StorageError
from ..rundir.atomic import read_json
from ..rundir.events import read_events
from ..rundir.layout import RunDir
from . import disk
from .course import Point
from .layout import BatchDir
from .pools import Use
from .progress import Progress

PHASES = ("load", "steady", "tail", "drain")
"""What a job's time goes into."""
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
    gave_up: bool = False
    """Too many rows failed."""
    units_per_gpu_hour: float | None = None
    """What its site charges."""
    pools: dict[str, Use] = {}
    """Role -> how busy its engines were while there were rows to begin with."""
    course: list[Point] = []

    @property
    def edges(self) -> tuple[float, float, float, float, float]:
        """Between the PHASES: the job's begin, the driver's, the moment when there was no row left to begin
        with, the last result, and the driver's end."""
        tail = self.tail if self.tail is not None else self.last_result or self.ended
        return self.job_began, self.began, tail, max(self.last_result or self.ended, tail), self.ended

    @property
    def working(self) -> float:
        """Seconds from the driver's begin to the last result: neither loading nor merging."""
        return self.edges[3] - self.edges[1]


def note(
    directory: BatchDir,
    member: str,
    slurm_job: str | None,
    progress: Progress,
    how: str,
    endpoint: Path,
    *,
    gave_up: bool = False,
) -> None:
    """Raises StorageError."""
    job = _job(endpoint.parent) if slurm_job is not None else _Job()
    used = resource.getrusage(resource.RUSAGE_SELF)
    part = Part(
        member=member,
        slurm_job=slurm_job,
        gpus=job.gpus,
        job_began=job.began or progress.began,
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
        gave_up=gave_up,
        units_per_gpu_hour=job.units_per_gpu_hour,
        pools=progress.pools,
        course=progress.course.points,
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


def ask_again(directory: BatchDir, parts: Sequence[Part]) -> None:
    """The command was given again: jobs that are noted so far count no more. Raises StorageError."""
    disk.write_whole(directory.asked, msgspec.json.encode([part.member for part in parts]))


def stuck(directory: BatchDir, parts: Sequence[Part]) -> bool:
    """Did the last jobs since the command was given get nothing done? Raises StorageError."""
    last = _since_asked(directory, parts)[-STUCK:]
    return len(last) == STUCK and not any(part.results for part in last)


def gave_up(directory: BatchDir, parts: Sequence[Part]) -> bool:
    """Did a job since the command was given stop since too many rows failed? Raises StorageError."""
    return any(part.gave_up for part in _since_asked(directory, parts))


def _since_asked(directory: BatchDir, parts: Sequence[Part]) -> list[Part]:
    # Names, because a file system's clock, and its steps, are not those of the node that noted a part.
    try:
        before = set(msgspec.json.decode(directory.asked.read_bytes() or b"[]", type=list[str]))
    except FileNotFoundError:
        return list(parts)
    except OSError as error:
        raise disk.failed(error, "read") from error
    except msgspec.DecodeError as error:
        raise StorageError(f"{directory.asked} is damaged: {error}", hint="remove that file") from error
    return [part for part in parts if part.member not in before]


class _Job(NamedTuple):
    gpus: int = 0
    began: float | None = None
    units_per_gpu_hour: float | None = None


def _job(run: Path) -> _Job:
    """The job whose run directory this is; nothing where it can't be read."""
    try:
        plan = read_json(RunDir(run).plan)
        parts = plan.get("components") or [plan]
        gpus = (
            sum(part["nodes"] * part["slots_per_node"] for part in parts) if plan["device"] == "cuda" else 0
        )
        starts = [
            event["t"] for event, _ in read_events(RunDir(run).events) if event["event"] == "job-started"
        ]
        return _Job(gpus, starts[-1] if starts else None, plan["site"].get("gpu_hour_rate"))
    except (OSError, HpcserveError, KeyError):
        return _Job()
