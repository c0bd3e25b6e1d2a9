"""What hpcserve asks of whoever starts jobs; Slurm and this machine answer alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .states import Phase, explain_pending, phase_of, words_for


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job at one moment."""

    job_id: str
    state: str
    """Slurm's own word: `PENDING`, `RUNNING`, …; `GONE` when nobody remembers the job."""
    reason: str = ""
    nodes: tuple[str, ...] = ()
    start: float | None = None
    """Unix seconds; for a queued job the estimate, if there is one."""
    end: float | None = None
    """Unix seconds: when it ended, or when its walltime does."""
    exit_code: int | None = None

    @property
    def phase(self) -> Phase:
        return phase_of(self.state)

    @property
    def over(self) -> bool:
        return self.phase in ("done", "failed", "gone")

    @property
    def words(self) -> str:
        """For people: `waiting in the queue: jobs with a higher priority come first`."""
        if self.phase == "queued" and self.reason:
            return f"{words_for(self.state)}: {explain_pending(self.reason).words}"
        return words_for(self.state)


class Scheduler(Protocol):
    """Starts, watches and ends jobs. Every method raises SlurmError with a hint."""

    def submit(self, script: Path, run_dir: Path, *, after: str | None = None) -> str:
        """Hand `script` over and return the job id. `run_dir` holds its logs/.

        `after`: a job that must be over before it begins, however it ended.
        """

    def state(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """All jobs in one question. Raises SlurmDown when nobody answers."""

    def cancel(self, job_id: str, *, force: bool) -> None:
        """Ask the job script to end (SIGTERM), or with `force` end every process of the job.

        Cancelling a job that is over is no error.
        """
