"""The one place that talks to Slurm."""

from __future__ import annotations

from typing import Literal

from .scheduler import JobState, Scheduler

__all__ = ["JobState", "Scheduler", "get"]


def get(kind: Literal["slurm", "local"]) -> Scheduler:
    """The scheduler of a site; `Site.scheduler` names it."""
    if kind == "local":
        from .local import LocalScheduler

        return LocalScheduler()
    from .sbatch import SlurmScheduler

    return SlurmScheduler()
