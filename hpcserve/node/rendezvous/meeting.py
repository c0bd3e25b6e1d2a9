"""What all transports share: who is expected, who showed up, and how the meeting ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ...errors import HpcserveError, RendezvousError
from ...plan.plan import Plan
from ...rundir.atomic import read_json, write_json
from ...rundir.layout import RunDir
from ..discovery.facts import RankFacts, Roster, to_json
from ..fabric.report import report
from ..journal import Journal
from ..rank import node_names
from .check import check_facts

Transport = Literal["mpi", "tcp", "file"]

_GAVE_UP = "gave-up-"


class TransportUnusable(RendezvousError):
    """This transport can't work here and another may: the job script tries the next one."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What rank 0 tells everybody; `message` is None when the roster is written."""

    message: str | None = None
    hint: str | None = None
    exit_code: int = 0

    @classmethod
    def of(cls, error: HpcserveError) -> Verdict:
        return cls(message=error.message, hint=error.hint, exit_code=error.exit_code)

    def raise_if_failed(self) -> None:
        """Raises the error rank 0 met, on every rank."""
        error = self.error()
        if error is not None:
            raise error

    def error(self, prefix: str = "") -> RendezvousError | None:
        if self.message is None:
            return None
        kind = TransportUnusable if self.exit_code == TransportUnusable.exit_code else RendezvousError
        return kind(prefix + self.message, hint=self.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """One rank's view of one rendezvous."""

    run: RunDir
    plan: Plan
    rank: int
    attempt: str
    transport: Transport
    environ: Mapping[str, str]
    key: bytes
    started: float
    """time.monotonic() when the rank began."""
    timeout: float
    """Seconds after `started` at which the wait ends with the missing ranks' names."""

    @property
    def directory(self) -> Path:
        """Files of the meeting itself."""
        return self.run.path / "rendezvous"

    @property
    def size(self) -> int:
        return self.plan.nodes

    def left(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self.started + self.timeout - time.monotonic())

    def announce(self, **more: Any) -> None:
        """Write ranks/RANK.json: this rank's process is alive."""
        self.run.ranks.mkdir(mode=0o700, exist_ok=True)
        entry = {
            "rank": self.rank,
            "node": socket.gethostname(),
            "pid": os.getpid(),
            "t": round(time.time(), 3),
            "attempt": self.attempt,
            "transport": self.transport,
        }
        write_json(self.run.rank(self.rank), {**entry, **more})

    def announced(self, rank: int) -> dict[str, Any] | None:
        """What a rank announced for this meeting; None if nothing yet.

        What it said over another transport, or before a requeue, is over.
        """
        return self._current(self.run.rank(rank))

    def missing(self) -> RendezvousError:
        """The error that names the ranks that gave up, or have no file in ranks/."""
        error = self.gave_up()
        if error is not None:
            return error
        absent = [rank for rank in range(self.size) if self.announced(rank) is None]
        waited = f"after {self.timeout:g} s"
        if not absent:
            return TransportUnusable(
                f"all {self.size} ranks started, but they could not talk to each other {waited}",
                hint="is the right network named as `network.control_interface` in the site config?"
                " A firewall between the nodes shows itself like this too",
            )
        names = node_names(self.environ)
        who = ", ".join(f"{rank} ({names[rank]})" if rank < len(names) else str(rank) for rank in absent)
        return RendezvousError(
            f"{len(absent)} of {self.size} ranks did not show up {waited}:"
            f" rank{'s' if len(absent) > 1 else ''} {who}",
            hint="look at those nodes' logs/rendezvous-RANK.log; a node that hangs on a file system or lacks"
            " the Python environment never gets as far as the rendezvous",
        )

    def give_up(self, error: HpcserveError) -> None:
        """Tell the others that this rank can't meet them, so that nobody waits for the deadline."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        entry = {
            "attempt": self.attempt,
            "transport": self.transport,
            "node": socket.gethostname(),
            "error": to_json(Verdict.of(error)),
        }
        write_json(self.directory / f"{_GAVE_UP}{self.rank}.json", entry)

    def gave_up(self) -> RendezvousError | None:
        """The error of the first other rank that gave up; None if none did."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return None
        for name in sorted(name for name in names if name.startswith(_GAVE_UP)):
            rank = name.removeprefix(_GAVE_UP).removesuffix(".json")
            entry = self._current(self.directory / name) if rank != str(self.rank) else None
            if entry is not None:
                error = verdict_from_json(entry["error"])
                return error.error(f"rank {rank} ({entry.get('node')}): ")
        return None

    def _current(self, path: Path) -> dict[str, Any] | None:
        try:
            entry = read_json(path)
        except FileNotFoundError:
            return None
        wanted = (self.attempt, self.transport)
        here = isinstance(entry, dict) and (entry.get("attempt"), entry.get("transport")) == wanted
        return entry if here else None

    def conclude(self, facts: Iterable[RankFacts]) -> Verdict:
        """Rank 0: check what the ranks found and write fabric.json and roster.json if it is sound."""
        entries = tuple(sorted(facts, key=lambda entry: entry.rank))
        try:
            check_facts(entries, self.plan)
            roster = Roster(
                transport=self.transport,
                attempt=self.attempt,
                seconds=round(time.monotonic() - self.started, 3),
                ranks=entries,
            )
            write_json(self.run.fabric, report(self.plan, entries))
            write_json(self.run.roster, to_json(roster))
        except HpcserveError as error:
            return Verdict.of(error)
        return Verdict()


class Attendance:
    """A look at who came and who gave up; on rank 0 it writes one `rank-joined` event for each rank."""

    def __init__(self, meeting: Meeting, events: Journal | None) -> None:
        self._meeting = meeting
        self._events = events
        self._absent = set(range(meeting.size))
        # All ranks look at the shared file system; only rank 0's looks are worth many.
        self._pause = 0.2 if events is not None else 1.0
        self._next = 0.0

    def look(self) -> None:
        """Look again, unless the last look was just now. Raises the error of a rank that gave up."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._pause
        self.record()
        error = self._meeting.gave_up()
        if error is not None:
            raise error

    def record(self) -> None:
        """Write the events of ranks that were absent at the last look."""
        if self._events is None or not self._absent:
            return
        try:
            # Listing the directory makes an NFS client fetch its attributes again.
            present = {name.removesuffix(".json") for name in os.listdir(self._meeting.run.ranks)}
        except FileNotFoundError:
            return
        for rank in sorted(self._absent):
            entry = self._meeting.announced(rank) if str(rank) in present else None
            if entry is not None:
                self._events.write("rank-joined", rank=rank, node=entry.get("node"))
                self._absent.discard(rank)


def verdict_from_json(value: Any) -> Verdict:
    """Raises ValueError (msgspec.ValidationError) for anything else than a verdict."""
    return msgspec.convert(value, Verdict)
