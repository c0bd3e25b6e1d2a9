"""The staging program, one process per node: `python -m hpcserve.node stage`."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec

from ...errors import HpcserveError
from ...rundir.atomic import write_json
from ..console import say, warn
from ..discovery.facts import Roster, wait_for_roster
from ..inputs import Inputs
from ..journal import Journal, open_journal
from ..rank import rank_of
from .coordinator import Coordinator
from .staged import Staged
from .trouble import NotStaged
from .worker import Worker


def run_stage(inputs: Inputs) -> int:
    """Stage the model, or tell why all engines load from the shared path; staged.json says which.

    Raises JobError or StorageError when the run can't go on: a lost node, a model that can't be read.
    """
    rank = rank_of(inputs.environ)
    if rank != 0:
        asyncio.run(_serve(inputs, rank))
        return 0
    inputs.run.staged.unlink(missing_ok=True)
    with open_journal(inputs) as journal:
        asyncio.run(_lead(inputs, journal))
    return 0


async def _serve(inputs: Inputs, rank: int) -> None:
    roster = await wait_for_roster(inputs.run, inputs.attempt)
    try:
        await Worker(inputs, roster, rank).run()
    except NotStaged as error:
        say(f"staging: given up: {error.message}")


async def _lead(inputs: Inputs, journal: Journal) -> None:
    began = time.monotonic()
    roster = await wait_for_roster(inputs.run, inputs.attempt)
    path = await _path(inputs, roster, journal)
    staged = Staged(attempt=inputs.attempt, path=path, seconds=round(time.monotonic() - began, 3))
    write_json(inputs.run.staged, msgspec.to_builtins(staged))


async def _path(inputs: Inputs, roster: Roster, journal: Journal) -> str | None:
    worker = asyncio.create_task(Worker(inputs, roster, 0).run())
    try:
        return await Coordinator(inputs, roster, journal).run()
    except NotStaged as error:
        message = f"the model is not staged, and all engines load it from the shared path: {error.message}"
        journal.write("warning", message=message, hint=error.hint)
        journal.write("staged", path=None)
        warn(message, error.hint)
        return None
    finally:
        worker.cancel()
        with suppress(HpcserveError, asyncio.CancelledError):
            await worker
