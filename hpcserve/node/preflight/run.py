"""The preflight program: `python -m hpcserve.node preflight`, one process per node, a step of its own."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

from ...errors import HpcserveError, KVPathError, StorageError
from ...rundir.atomic import write_json
from ..console import say, warn
from ..discovery.facts import Roster, wait_for_roster
from ..inputs import Inputs
from ..journal import Journal, open_journal
from ..ports import listen
from ..rank import rank_of
from .coordinator import Coordinator
from .ending import tell_over
from .member import Member, NoCoordinator, port_range
from .probes import probes_on
from .records import Outcome
from .report import document, event, table
from .verdict import Finding, judge

_TOLD = 128 + signal.SIGTERM
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_preflight(inputs: Inputs) -> int:
    """Measure, and leave preflight.json and the `preflight` event behind. Returns 0, or 143 when told to end.

    Raises KVPathError (exit status 6) on rank 0 when no prefill node reaches any decode node. Whatever else
    is wrong is a warning (exit status 1), and the job goes on.
    """
    rank, status = None, 1
    try:
        rank = rank_of(inputs.environ)
        if rank == 0:
            inputs.run.preflight.unlink(missing_ok=True)
        status = asyncio.run(_run(inputs, rank))
    except KVPathError as error:
        status = error.exit_code
        raise
    except HpcserveError as error:
        # Should the engines need what is missing here, they say so themselves.
        warn(f"no KV preflight: {error.message}", error.hint)
    finally:
        if rank == 0:
            _tell_over(inputs, status)
    return status


def _tell_over(inputs: Inputs, status: int) -> None:
    try:
        tell_over(inputs.run, inputs.attempt, status)
    except StorageError as error:
        # The job script then has Slurm's status of the step, which mostly is the same.
        warn(f"the end of the preflight is not told: {error.message}", error.hint)


async def _run(inputs: Inputs, rank: int) -> int:
    roster = await wait_for_roster(inputs.run, inputs.attempt)
    placed = probes_on(inputs.plan, roster, rank, inputs.environ)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, told.set)
    async with Member(inputs, roster, rank, placed) as member:
        mine = asyncio.create_task(member.run())
        if rank == 0:
            return await _coordinate(inputs, roster, mine, told)
        await _first(mine, told)
        if mine.done():
            mine.result()
        else:
            await _cancel(mine)
        # Rank 0 may have heard of it first, and sent this one away.
        return _TOLD if told.is_set() else 0


async def _coordinate(inputs: Inputs, roster: Roster, member: asyncio.Task[None], told: asyncio.Event) -> int:
    coordinator = Coordinator(inputs, roster)
    listening = listen(port_range(inputs), roster.ranks[0].address)
    server = await coordinator.serve(listening)
    measuring = asyncio.create_task(coordinator.run())
    try:
        await _first(measuring, told)
        over = measuring.done()
        outcome = measuring.result() if over else coordinator.outcome(cut_short=True)
        with open_journal(inputs) as journal:
            _report(inputs, journal, outcome)
        return 0 if over else _TOLD
    finally:
        await _cancel(measuring)
        await coordinator.dismiss()
        server.close()
        with suppress(NoCoordinator, asyncio.TimeoutError):
            await asyncio.wait_for(member, 1.0)


def _report(inputs: Inputs, journal: Journal, outcome: Outcome) -> None:
    """Raises KVPathError, after the `failed` event, when the job can't serve."""
    verdict = judge(outcome)
    write_json(inputs.run.preflight, document(outcome, verdict, inputs.attempt))
    journal.write("preflight", **event(outcome))
    say(table(outcome))
    for finding in verdict.findings:
        _tell(journal, finding)
    if verdict.fatal is not None and not outcome.cut_short:
        error = KVPathError(verdict.fatal.message, hint=verdict.fatal.hint)
        journal.write("failed", message=error.message, hint=error.hint, exit_code=error.exit_code)
        raise error


def _tell(journal: Journal, finding: Finding) -> None:
    journal.write("warning", message=finding.message, hint=finding.hint)
    if finding.failed:
        say(f"error: {finding.message}\nhint: {finding.hint}")
    else:
        warn(finding.message, finding.hint)


async def _first(task: asyncio.Task[object] | asyncio.Task[None], told: asyncio.Event) -> None:
    """Until the task is over, or this process was told to end."""
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    await _cancel(waiting)


async def _cancel(task: asyncio.Task[object] | asyncio.Task[None] | asyncio.Task[bool]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
