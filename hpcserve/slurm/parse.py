"""What Slurm's commands print, as values. Pure: text in, dataclasses out."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime

from ..errors import SlurmDown, SlurmError
from .nodelist import expand
from .scheduler import JobState
from .states import explain_pending

SQUEUE_FORMAT = "%i|%T|%S|%e|%N|%r"
"""Job, state, start, end, nodes, reason. The reason is last: it may hold any character."""
SACCT_FORMAT = "JobIDRaw,State,Start,End,NodeList,ExitCode"


def job_id(sbatch_output: str) -> str:
    """The id that `sbatch --parsable` prints as `ID` or `ID;CLUSTER`, after whatever a site adds."""
    for line in reversed(sbatch_output.splitlines()):
        found = re.fullmatch(r"(\d+)(;\S+)?", line.strip())
        if found:
            return found.group(1)
    raise SlurmError(
        f"`sbatch --parsable` printed no job id but {sbatch_output.strip()!r}",
        hint="look for the job with `squeue --me` before launching again",
    )


def squeue(text: str) -> dict[str, JobState]:
    """Lines of `squeue --noheader --format=SQUEUE_FORMAT`; lines of another shape are skipped.

    The components of a heterogeneous job (`12+0`, `12+1`) become one job. Raises SlurmDown when no line has
    that shape: "no such job" would be the wrong conclusion.
    """
    found: dict[str, dict[int, JobState]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 5)
        job = re.fullmatch(r"(\d+)(?:\+(\d+))?", fields[0], re.ASCII)
        if len(fields) != 6 or job is None:
            continue
        _, state, start, end, nodes, reason = fields
        found.setdefault(job[1], {})[int(job[2] or 0)] = JobState(
            job_id=job[1],
            state=state,
            reason="" if reason == "None" and state != "PENDING" else reason,
            nodes=_nodes(nodes),
            start=time_of(start),
            end=time_of(end),
        )
    jobs = {job: _whole([parts[number] for number in sorted(parts)]) for job, parts in found.items()}
    if not jobs and text.strip():
        raise SlurmDown(
            f"squeue printed something else than jobs: {text.strip()[:200]!r}",
            hint="is `squeue` an alias or a wrapper here? Try `squeue --me` by hand",
        )
    return jobs


def _whole(parts: list[JobState]) -> JobState:
    """A job of its components, in their order: as the first one, which runs the job script.

    They wait until all can start, so the reason is that of one which never will, if there is one. The job is
    over when all are.
    """
    first = parts[0]
    hopeless = next((part for part in parts if explain_pending(part.reason).never), first)
    held = first.over and not all(part.over for part in parts)
    return replace(
        first,
        state="COMPLETING" if held else first.state,
        reason=hopeless.reason if first.phase == "queued" else first.reason,
        nodes=tuple(name for part in parts for name in part.nodes),
    )


def sacct(text: str) -> dict[str, JobState]:
    """Lines of `sacct --noheader --parsable2 --allocations --format=SACCT_FORMAT`.

    A requeued job has several lines; the last one counts.
    """
    jobs: dict[str, JobState] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 6 or not fields[0].isdigit():
            continue
        job, state, start, end, nodes, status = fields
        code, _, signal = status.partition(":")
        jobs[job] = JobState(
            job_id=job,
            state=state.split()[0].rstrip("+") if state else "GONE",  # "CANCELLED by 1000"
            nodes=_nodes(nodes),
            start=time_of(start),
            end=time_of(end),
            exit_code=128 + int(signal) if _number(signal) else _number(code),
        )
    return jobs


def time_of(text: str) -> float | None:
    """Unix seconds of `%s` or of ISO local time; None for `N/A`, `Unknown`, `NONE`."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _nodes(text: str) -> tuple[str, ...]:
    if not text or text.startswith(("(", "None")):  # sacct: "None assigned"
        return ()
    try:
        return expand(text)
    except ValueError:
        return (text,)
