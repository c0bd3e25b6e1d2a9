"""The staging program, one process per node: `python -m hpcserve.node stage`."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec

from ...errors import HpcserveError
from ...rundir.atomic import write_json
from ..agent.orphan import end_orphan
from ..console import say, warn
from ..discovery.facts import Roster, wait_for_roster
from ..frames import CLOSE_TIMEOUT
from ..inputs import Inputs
from ..journal import Journal, open_journal
from ..rank import rank_of
from .coordinator import Coordinator
from .staged import Staged
from .trouble import LostHead, NotStaged
from .worker import SETTLE, Worker, coordinator_file


def run_stage(inputs: Inputs) -> int:
    """Stage the model, or tell why all engines load from the shared path; staged.json says which.

    Raises JobError or StorageError when the run can't go on: a lost node, a model that can't be read. Threads
    that a file system holds up are left behind, and end with the process.
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
    worker = Worker(inputs, roster, rank)
    try:
        await worker.run()
    except NotStaged as error:
        say(f"staging: given up: {error.message}")
    except LostHead as error:
        say(f"staging: {error.message}")
        await _end_orphan(inputs, roster, rank, worker.head)
        raise


async def _end_orphan(inputs: Inputs, roster: Roster, rank: int, head: tuple[str, int] | None) -> None:
    """The job script died with the head node, unless only the way to it is cut."""

    async def pause(seconds: float) -> bool:
        """True once the coordinator ended in order."""
        await asyncio.sleep(seconds)
        try:
            return head is not None and not coordinator_file(inputs).exists()
        except OSError:
            return False

    somewhere = (roster.ranks[0].address, inputs.plan.site.ports.low)
    await end_orphan(inputs, rank, head or somewhere, pause)


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
        # The coordinator told it to end, unless it never came so far.
        await asyncio.wait({worker}, timeout=SETTLE + CLOSE_TIMEOUT)
        worker.cancel()
        with suppress(HpcserveError, asyncio.CancelledError):
            await worker
