"""How the work on a batch ends: its output made, also where a part of the rows was never answered."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from ...rundir.atomic import read_json
from ..finish import finish, settle
from ..journal import Entry, Kind
from ..layout import BatchDir
from ..manifest import read_manifest
from ..members import this_process
from ..tally import Standing
from ..work import Work
from .records import Counts


class Outcome(NamedTuple):
    """A finished output. Both files are there; one may be empty."""

    completed: int
    failed: int


def make_output(directory: BatchDir) -> Outcome:
    """Merge what was answered; may be done again. Raises Unfinished, StorageError, ConfigError."""
    if not settle(directory):
        finish(directory)
    report = read_json(directory.report)
    return Outcome(report["results"] - report["errors"], report["errors"])


def give_up(directory: BatchDir, code: str, message: str) -> None:
    """Make an error of each row that has no result. Raises StorageError, RunError."""
    if settle(directory):
        return
    work = Work(directory, this_process(os.environ))
    try:
        for item in np.flatnonzero(~work.tally.done).tolist():
            work.journal.append(Entry(item=item, kind=Kind.ERROR, attempts=0, error=(code, message)))
    finally:
        work.close()


def count(directory: BatchDir) -> Counts:
    """The results by now, as the journals have them. Raises StorageError, RunError."""
    items = read_manifest(directory).items
    if not directory.journals.exists():
        return Counts(total=items)
    standing = Standing(directory.journals, items)
    failed = int(np.count_nonzero(standing.is_error))
    return Counts(total=items, completed=items - standing.missing - failed, failed=failed)
