"""Ends a job whose head node died: Slurm alone would keep its other nodes until the walltime.

`slurm/allocation.py` says why. Each agent that gave the controller up, or staging process that gave up its
coordinator, looks at the job until Slurm has noticed too, or until its patience ends; the first that finds
the head node gone ends the job for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ...errors import HpcserveError, SlurmDown, StorageError
from ...slurm.allocation import Allocation
from ...slurm.sbatch import SlurmScheduler
from ..console import say, warn
from ..inputs import Inputs
from ..journal import open_journal

EVERY = 30.0
"""Seconds between two looks."""
PATIENCE = 1800.0
"""Seconds of looking. Slurm gives a silent node SlurmdTimeout, 300 s where the site did not change it."""
_BETWEEN = 0.5
"""Seconds between the first looks of two ranks: they gave up together, and one of them is enough."""

_CONNECT = 5.0

Pause = Callable[[float], Awaitable[bool]]
"""Wait so many seconds; True when this process is to go at once."""


async def end_orphan(inputs: Inputs, rank: int, head: tuple[str, int], pause: Pause) -> None:
    """Returns when the job is ended or can end by itself, when `pause` says so, or when patience is over.

    `head`: address and port of what was lost there; the port need not be served any more.
    """
    job = inputs.environ.get("SLURM_JOB_ID")
    if inputs.plan.site.scheduler != "slurm" or not job:
        return
    slurm = SlurmScheduler(environ=inputs.environ)
    waited, wait = 0.0, min(rank * _BETWEEN, EVERY)
    while waited < PATIENCE and not await pause(wait):
        try:
            allocation = await asyncio.to_thread(slurm.allocation, job)
            if allocation is None or not allocation.runs:
                return
            if allocation.orphaned:
                await asyncio.to_thread(_end, inputs, slurm, job, allocation)
                return
            if await _node_answers(*head):
                # It is that process alone that is lost: the job script is there, and ends the job once this
                # step is over.
                return
        except SlurmDown as error:
            # The next look is the retry.
            warn(error.message, error.hint)
        except HpcserveError as error:
            warn(f"whether the head node is still in the job is not known: {error.message}", error.hint)
            say(f"hint: if not, the job holds its other nodes until its walltime; end it: `scancel {job}`")
            return
        waited += wait
        wait = EVERY


async def _node_answers(address: str, port: int) -> bool:
    """Does its kernel take the connection, or refuse it?"""
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _end(inputs: Inputs, slurm: SlurmScheduler, job: str, allocation: Allocation) -> None:
    """Raises SlurmError."""
    what = f"the head node {allocation.batch_host} died"
    # Slurm first: what it refuses is tried again, and told once. It gives this process KillWait to tell it.
    if allocation.requeues:
        slurm.requeue(job)
        _tell(inputs, "warning", message=f"{what}: the job starts again", hint="Slurm put it back")
    else:
        slurm.cancel(job, force=True)
        _tell(inputs, "failed", message=what, hint="`sacct` and the site know why; launch again", exit_code=6)


def _tell(inputs: Inputs, event: str, **fields: object) -> None:
    say(str(fields["message"]))
    try:
        with open_journal(inputs) as journal:
            journal.write(event, **fields)
    except StorageError as error:
        warn(error.message, error.hint)
