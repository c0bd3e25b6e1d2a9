"""What every in-job program reads first: the plan, the job's key, and who it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.records import from_json
from ..errors import RunError, StorageError
from ..plan.plan import Plan
from ..rundir.atomic import read_json, storage_error
from ..rundir.layout import RunDir
from .rank import attempt_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    run: RunDir
    plan: Plan
    job_key: str
    attempt: str
    environ: Mapping[str, str]


def load_inputs(run_dir: Path, environ: Mapping[str, str] | None = None) -> Inputs:
    """Read the run directory. Raises RunError when it is none, ConfigError for a plan of another version."""
    environment = dict(os.environ if environ is None else environ)
    run = RunDir(run_dir.absolute())
    try:
        plan = from_json(Plan, read_json(run.plan), where=str(run.plan))
    except FileNotFoundError as error:
        raise RunError(
            f"{run.path} is not a run directory that this node can read: no plan.json",
            hint="is `storage.runs` of the site on a file system that all nodes share?",
        ) from error
    return Inputs(
        run=run,
        plan=plan,
        job_key=read_secret(run.job_key),
        attempt=attempt_of(environment),
        environ=environment,
    )


def read_secret(path: Path) -> str:
    """A key from secrets/. Raises StorageError when it can't be read or is empty."""
    try:
        secret = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise storage_error(error, "read") from error
    if not secret:
        raise StorageError(f"{path} is empty", hint="launch the run again; the file was damaged")
    return secret
