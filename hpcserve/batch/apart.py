"""A large batch is planned and merged in jobs without GPUs, where the site has a partition for these: a login
node is shared, and nodes with GPUs cost the same while they merge.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config.site import Site
from ..errors import StorageError
from ..rundir.atomic import storage_error
from ..slurm.function_job import FunctionJob, submit
from ..slurm.scheduler import JobState
from .begin import BatchRequest, Begun, Model, begin
from .finish import finish, is_complete, settle
from .inputs.patterns import find
from .layout import BatchDir
from .merge import Unfinished

_MIB = 1 << 20
_LEAST = 30
"""Minutes that such a job may take."""
_PER_GIB = 60
"""And further ones for each GiB of input: several times what was measured (docs/batch.md)."""
_ROWS_TOLD = 100_000


def is_large(request: BatchRequest, site: Site) -> bool:
    """This site wants such an input planned and merged in jobs. Raises ConfigError when there is none."""
    slurm = site.slurm
    if site.scheduler != "slurm" or slurm.cpu_partition is None:
        return False
    return _size(request) >= slurm.cpu_job_from * _MIB


def plan(
    request: BatchRequest,
    model: Model,
    site: Site,
    name: str,
    runs: Path,
    on_submit: Callable[[FunctionJob, Path], None],
    on_change: Callable[[JobState], None],
) -> Begun:
    """begin() in a job; `runs` is a directory of all nodes. Ctrl-C ends the job. Raises as begin() does, and
    SlurmError."""
    folder: Path | None = None
    try:
        runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-plan.", dir=runs))
        job = submit(site, folder, f"{name}-plan", _minutes(request), _begin, request, model)
        on_submit(job, folder)
        try:
            begun: Begun = job.result(on_change)
        except KeyboardInterrupt:
            job.cancel()
            raise
        return begun
    except OSError as error:
        raise storage_error(error, "make the directory of a job") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def merge(
    request: BatchRequest, directory: BatchDir, site: Site, name: str, after: Sequence[str]
) -> FunctionJob:
    """Submit the merge of what the jobs `after` will have done. Raises SlurmError and StorageError."""
    return submit(
        site, directory.merge, f"{name}-merge", _minutes(request), merge_if_answered, directory, after=after
    )


def merge_if_answered(directory: BatchDir) -> bool:
    """Is the batch complete now? Raises as finish() does."""
    if settle(directory):
        return True
    try:
        merged = finish(directory)
    except Unfinished as error:
        print(f"{directory.out}: {error}; the same command goes on")
        return False
    except StorageError:
        if is_complete(directory):  # somebody else was quicker, and cleared up
            return True
        raise
    print(f"complete: {merged.items:,} rows, {merged.failed:,} of them errors: {merged.output}")
    return True


def _begin(request: BatchRequest, model: Model) -> Begun:
    def on_row(row: int) -> None:
        if row and row % _ROWS_TOLD == 0:
            print(f"planning: {row:,} rows", flush=True)

    return begin(request, model, on_row)


def _minutes(request: BatchRequest) -> int:
    return _LEAST + _PER_GIB * _size(request) // (1 << 30)


def _size(request: BatchRequest) -> int:
    """Bytes of the input's files."""
    return sum(found.status.st_size for found in find(request.inputs))
