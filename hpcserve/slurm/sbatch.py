"""Slurm itself, through its commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SlurmDown, SlurmError
from . import parse
from .allocation import Allocation, read_allocation
from .refusals import hint_for, is_outage, sentence
from .scheduler import JobState

# Variables of the caller that Slurm's commands need. All other SLURM_* describe the job that
# `hpcserve launch` itself may run in, and would change the new one.
_KEEP = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CLUSTER_NAME", "SLURM_JWT"}


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What sbatch starts with: the caller's variables, less those that would override the script."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEEP or not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }


def overriding_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """SBATCH_* variables: they would win over the script, so hpcserve leaves them out and says so."""
    return {name: value for name, value in environ.items() if name.startswith("SBATCH_") and value}


class SlurmScheduler:
    """Calls sbatch, squeue, sacct, scancel and scontrol. Every call is bounded by `timeout` seconds."""

    def __init__(self, *, timeout: float = 60.0, environ: Mapping[str, str] | None = None) -> None:
        self._timeout = timeout
        self._environ = job_environment(os.environ if environ is None else environ)
        self._accounting = True

    def submit(self, script: Path, run_dir: Path, *, after: str | None = None) -> str:
        # afterany: what comes after a job that was cancelled or failed looks itself whether it has work.
        order = [] if after is None else [f"--dependency=afterany:{after}"]
        done = self._call(["sbatch", "--parsable", f"--chdir={run_dir}", *order, str(script)])
        if done.returncode == 0:
            return parse.job_id(done.stdout)
        why = sentence(done.stderr or done.stdout)
        if is_outage(why):
            # The controller may have taken the job before the connection broke.
            raise SlurmDown(
                f"sbatch got no answer: {why}",
                hint="look with `squeue --me` before launching again; a job without its run directory "
                "ends at once. `scontrol ping` shows the controller's state",
            )
        raise SlurmError(f"sbatch refused the job: {why}", hint=hint_for(why))

    def state(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        if not job_ids:
            return {}
        wanted = ",".join(job_ids)
        done = self._call(
            ["squeue", f"--jobs={wanted}", "--states=all", "--noheader", f"--format={parse.SQUEUE_FORMAT}"]
        )
        # Asked for one job it has forgotten, squeue calls the id invalid; sacct may remember.
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise _failed("squeue", done)
        found = {job: state for job, state in parse.squeue(done.stdout).items() if job in job_ids}
        missing = [job for job in job_ids if job not in found]
        if missing:
            found |= self._remembered(missing)
        return {job: found.get(job, JobState(job_id=job, state="GONE")) for job in job_ids}

    def cancel(self, job_id: str, *, force: bool) -> None:
        # --batch signals the script alone: it drains the engines before they see anything.
        how = [] if force else ["--signal=TERM", "--batch"]
        done = self._call(["scancel", *how, job_id])
        over = ("Invalid job id", "already completing", "already completed", "Job/step already")
        if done.returncode != 0 and not any(text in done.stderr for text in over):
            raise _failed("scancel", done)

    def allocation(self, job_id: str) -> Allocation | None:
        """The nodes the job has now; None where Slurm has forgotten it."""
        done = self._call(["scontrol", "show", "job", "--oneliner", job_id])
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise _failed("scontrol", done)
        return read_allocation(done.stdout)

    def requeue(self, job_id: str) -> None:
        """End the job, and put it back into the queue."""
        done = self._call(["scontrol", "requeue", job_id])
        if done.returncode != 0:
            raise _failed("scontrol", done)

    def _remembered(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What accounting knows. A cluster without it has none to ask, and is not asked again."""
        if not self._accounting:
            return {}
        if shutil.which("sacct", path=self._environ.get("PATH")) is None:
            self._accounting = False
            return {}
        done = self._call(
            [
                "sacct",
                f"--jobs={','.join(job_ids)}",
                "--noheader",
                "--parsable2",
                "--allocations",
                "--duplicates",
                f"--format={parse.SACCT_FORMAT}",
            ]
        )
        if done.returncode != 0:
            self._accounting = False
            return {}
        found = parse.sacct(done.stdout)
        return {job: state for job, state in found.items() if job in job_ids}

    def _call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout,
                env=self._environ | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
                if command[0] != "sbatch"
                else self._environ,
                stdin=subprocess.DEVNULL,
                # Ctrl-C at the terminal must not cut sbatch off after Slurm has taken the job.
                start_new_session=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise SlurmError(
                f"`{command[0]}` is not on this host's PATH",
                hint="launch from a login node of the cluster, or try it here with `--site local`",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise SlurmDown(
                f"`{command[0]}` gave no answer in {self._timeout:.0f} seconds",
                hint="Slurm is busy: `scontrol ping` shows its state; try again later",
            ) from error


def _failed(program: str, done: subprocess.CompletedProcess[str]) -> SlurmError:
    why = sentence(done.stderr or done.stdout)
    kind = SlurmDown if is_outage(why) else SlurmError
    return kind(f"{program} failed: {why}", hint=hint_for(why))
