"""The rendezvous program: `python -m hpcserve.node rendezvous`, one process per rank."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

from ...errors import HpcserveError
from ..console import say
from ..discovery.facts import RankFacts, gather, read_roster
from ..inputs import Inputs
from ..journal import Journal, note_job_started, open_journal
from ..ports import hold
from ..rank import rank_of
from . import mpi, shared_file, tcp
from .meeting import Attendance, Meeting, Transport, TransportUnusable

_TRANSPORTS = {"mpi": mpi.meet, "tcp": tcp.meet, "file": shared_file.meet}
_NAMES = {"mpi": "MPI", "tcp": "TCP", "file": "the shared file system"}


def default_transport(inputs: Inputs) -> Transport:
    """MPI unless the site says it has none that works."""
    return "tcp" if inputs.plan.site.slurm.mpi == "none" else "mpi"


def run_rendezvous(inputs: Inputs, *, transport: Transport | None, timeout: float) -> None:
    """Meet the other ranks and leave roster.json behind.

    Raises TransportUnusable (exit status 75) when another transport may work, RendezvousError when a
    rank is missing or the ranks disagree.
    """
    chosen = transport or default_transport(inputs)
    meeting = Meeting(
        run=inputs.run,
        plan=inputs.plan,
        rank=rank_of(inputs.environ),
        attempt=inputs.attempt,
        transport=chosen,
        environ=inputs.environ,
        key=inputs.job_key.encode(),
        started=time.monotonic(),
        timeout=timeout,
    )
    if meeting.rank != 0:
        _meet(meeting, None)
        return
    with open_journal(inputs) as journal:
        _forget_earlier_attempts(inputs)
        note_job_started(inputs, journal)
        _meet(meeting, journal)
        _report(inputs, journal)


def _meet(meeting: Meeting, journal: Journal | None) -> None:
    try:
        meeting.announce()
        facts = _look(meeting)
        _TRANSPORTS[meeting.transport](meeting, facts, Attendance(meeting, journal)).raise_if_failed()
    except HpcserveError as error:
        # Not a `failed` event: another transport may be tried. The job script's last step writes it.
        meeting.give_up(error)
        if journal is not None and isinstance(error, TransportUnusable):
            message = f"no rendezvous over {_NAMES[meeting.transport]}: {error.message}"
            journal.write("warning", message=message, hint=error.hint)
            say(f"rendezvous on {socket.gethostname()}: trying another transport")
        raise


def _look(meeting: Meeting) -> RankFacts:
    facts = gather(meeting.plan, meeting.rank, meeting.environ)
    with hold(tcp.port_range(meeting), facts.address) as held:
        return replace(facts, port=held.first)


def _forget_earlier_attempts(inputs: Inputs) -> None:
    # A requeued job comes back to the same directory: nobody may take old addresses for new ones.
    for stale in (inputs.run.roster, inputs.run.head, inputs.run.endpoint):
        stale.unlink(missing_ok=True)


def _report(inputs: Inputs, journal: Journal) -> None:
    roster = read_roster(inputs.run, inputs.attempt)
    assert roster is not None, "rank 0 has just written it"
    count = len(roster.ranks)
    journal.write("rendezvous", transport=roster.transport, ranks=count, seconds=roster.seconds)
    say(
        f"rendezvous: {count} rank{'s' if count > 1 else ''} met over {_NAMES[roster.transport]}"
        f" in {roster.seconds:.2f} s"
    )
