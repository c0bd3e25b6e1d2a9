"""What `hpcserve batch` shows of a batch whose jobs it submitted. Ctrl-C ends the watching, not the jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .output import say

if TYPE_CHECKING:
    from ..batch.begin import Begun
    from ..plan.plan import Plan
    from ..rundir.runs import Run
    from ..slurm.function_job import FunctionJob
    from ..slurm.scheduler import JobState

_GLANCE = 2.0


def watch(runs: Sequence[Run], plan: Plan, begun: Begun) -> bool:
    """Until the batch is complete, or no job is left. Raises JobError for a job that failed, when it was the
    last one."""
    from ..batch.finish import is_complete
    from ..control import failure, overview
    from .live import follow, view

    names = [run.record.run_id for run in runs]
    try:
        for run in runs:
            with view() as shown:
                progress = follow(run, plan, shown)
            if progress.ready is not None:
                _until_over(run, begun)
            if is_complete(begun.directory):
                return True
            [seen], _ = overview([run])
            if seen.state == "failed" and run is runs[-1]:
                raise failure(run, seen)
            say(f"{run.record.run_id}: {seen.detail}")
    except KeyboardInterrupt:
        look, end = f"hpcserve status {names[0]}", f"hpcserve stop {names[0]}"
        say(f"\nthe batch goes on. Look at it: `{look}`; end it: `{end}`")
        raise
    return False


def watch_merge(job: FunctionJob) -> bool:
    """Until the job that merges is over; is the batch complete? Raises its errors, and SlurmError."""
    told: set[str] = set()

    def on_change(state: JobState) -> None:
        if state.words not in told:
            told.add(state.words)
            say(f"merge, job {state.job_id}: {state.words}")

    complete: bool = job.result(on_change)
    return complete


def _until_over(run: Run, begun: Begun) -> None:
    """Show how it goes until the run has ended."""
    from ..batch.progress import line
    from ..control import LIVE, overview
    from ..errors import StorageError
    from ..rundir.atomic import read_json

    told = ""
    while True:
        try:
            now = line(read_json(begun.directory.status))
        except (FileNotFoundError, StorageError):
            now = told
        if now != told:
            told = now
            say(now)
        [seen], _ = overview([run])
        if seen.state not in LIVE:
            return
        time.sleep(_GLANCE)
