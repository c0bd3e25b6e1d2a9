"""Jobs without GPUs that call one Python function: large datasets are prepared and merged in these.

submitit writes the script, carries the call there and brings its result back (ADR 1 says why a launch is no
such job). Whether a job lives is asked of Slurm as for every other job, which works without accounting.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.site import Site
from ..errors import HpcserveError, SlurmError
from ..rundir.atomic import storage_error
from .refusals import hint_for, sentence
from .sbatch import SlurmScheduler, job_environment
from .scheduler import JobState
from .watch import Watch

if TYPE_CHECKING:
    import submitit

CPUS = 2
_GLANCE = 0.25
_LAST_WORDS = 10.0
"""Seconds that the result of a job that is over has to reach this host."""
_TAIL = 2000


class FunctionJob:
    """One that was submitted."""

    def __init__(self, job: submitit.Job[Any]) -> None:
        self._job = job
        self.job_id: str = job.job_id

    def result(self, on_change: Callable[[JobState], None] = lambda state: None) -> Any:
        """What the function returned; `on_change` hears how the job goes meanwhile.

        Raises an error of hpcserve's own that the function raised, and SlurmError when the job ended without
        a result.
        """
        watch = Watch(SlurmScheduler(), [self.job_id])
        told: tuple[str, str] | None = None
        over_since: float | None = None
        while not self._job.paths.result_pickle.exists():
            state = watch.poll().get(self.job_id)
            if state is not None and (state.state, state.reason) != told:
                told = state.state, state.reason
                on_change(state)
            over_since = (over_since or time.monotonic()) if state is not None and state.over else None
            if over_since is not None and time.monotonic() - over_since > _LAST_WORDS:
                assert state is not None
                raise self._no_result(state)
            time.sleep(_GLANCE)
        [found] = self._job.results()
        if isinstance(found, HpcserveError):
            raise found
        return found

    def cancel(self) -> None:
        """End it, if it is not over. Raises SlurmError."""
        SlurmScheduler().cancel(self.job_id, force=True)

    def _no_result(self, state: JobState) -> SlurmError:
        log: Path = self._job.paths.stderr
        try:
            said = log.read_text(errors="replace")[-_TAIL:].strip()
        except OSError:
            said = ""
        return SlurmError(
            f"job {self.job_id} ended without a result: {state.words}" + (f"\n{said}" if said else ""),
            hint="the same command begins it again; `slurm.cpu_memory` of the site may be too little",
        )


def submit(
    site: Site,
    folder: Path,
    name: str,
    minutes: int,
    function: Callable[..., Any],
    *arguments: Any,
    after: Sequence[str] = (),
) -> FunctionJob:
    """Submit `function(*arguments)` to the site's `slurm.cpu_partition`; both must be importable there.

    `folder`, on a file system of all nodes, takes its files. `after`: jobs that must be over first, however
    they ended. Raises SlurmError and StorageError.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    class Executor(submitit.SlurmExecutor):
        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # Variables that would win over the script, or are of the job that this may run in.
            unset = sorted(os.environ.keys() - job_environment(os.environ).keys())
            return ["env", *(f"--unset={name}" for name in unset), "sbatch", str(submission_file_path)]

    slurm = site.slurm
    more = {"export": "ALL"}
    if after:
        more["dependency"] = f"afterany:{':'.join(after)}"
    limit = minutes if slurm.max_walltime is None else min(minutes, slurm.max_walltime // 60)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        executor = Executor(folder, max_num_timeout=0)
        executor.update_parameters(
            job_name=name,
            partition=slurm.cpu_partition,
            account=slurm.account,
            mem=slurm.cpu_memory,
            time=limit,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=CPUS,
            setup=_setup(site),
            # Neither --mpi nor --export of an srun matters to one process.
            use_srun=False,
            additional_parameters=more,
        )
        # It prints what sbatch says beside raising it.
        with contextlib.redirect_stderr(io.StringIO()):
            return FunctionJob(executor.submit(_told, function, *arguments))
    except (FailedJobError, FailedSubmissionError) as error:
        why = sentence(str(error))
        raise SlurmError(f"sbatch refused the job {name}: {why}", hint=hint_for(why)) from error
    except OSError as error:
        raise storage_error(error, "write the job's files") from error
    except RuntimeError as error:
        raise SlurmError(
            "`srun` is not on this host's PATH", hint="give the command on a login node of the cluster"
        ) from error


def _told(function: Callable[..., Any], *arguments: Any) -> Any:
    """An error of hpcserve's own is an answer: it is raised again where somebody reads it."""
    try:
        return function(*arguments)
    except HpcserveError as error:
        return error


def _setup(site: Site) -> list[str]:
    """Bash lines before the function: what the site's jobs need on a node."""
    setup = site.setup
    lines = [f"module load {shlex.quote(module)} || exit 3" for module in setup.modules]
    if lines:
        lines.insert(0, "type module >/dev/null 2>&1 || . /etc/profile")
    lines += setup.script.rstrip("\n").splitlines()
    return [*lines, *(f"export {name}={shlex.quote(value)}" for name, value in setup.env.items())]
