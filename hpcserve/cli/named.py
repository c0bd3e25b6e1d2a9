"""Finds the run that a command names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .output import warn

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..rundir.runs import Run


def named_run(text: str) -> Run:
    """The run called `text`, or the one in the directory `text`. Raises RunError with the nearest names."""
    from ..rundir.runs import find_run, read_run

    if "/" in text:
        return read_run(Path(text).absolute())
    return find_run(text, known_runs()[0], _live)


def known_runs() -> tuple[list[Run], list[Path]]:
    """All runs, newest first, and where they were looked for; a warning for each that can't be read."""
    from ..launch import known_roots
    from ..rundir.runs import list_runs

    roots, errors = known_roots(os.environ)
    runs, unreadable = list_runs(roots)
    for error in (*errors, *unreadable):
        warn(error.message, error.hint)
    return runs, roots


def _live(runs: Sequence[Run]) -> list[bool]:
    from ..control import LIVE, overview

    seen, _ = overview(runs)  # when the scheduler does not answer, the command itself says so
    return [entry.state in LIVE for entry in seen]


def plan_of(run: Run) -> Plan:
    """The plan as it was launched. Raises RunError, StorageError, ConfigError."""
    from ..config.load import from_json
    from ..errors import RunError
    from ..plan.plan import Plan
    from ..rundir.atomic import read_json

    try:
        value = read_json(run.directory.plan)
    except FileNotFoundError as error:
        raise RunError(f"run {run.record.run_id} has no plan.json", hint="was it removed?") from error
    return from_json(Plan, value, where=str(run.directory.plan))
