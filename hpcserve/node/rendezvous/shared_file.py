"""Rendezvous over the shared file system: for sites where neither MPI nor TCP gets through."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from ...errors import RendezvousError
from ...rundir.atomic import read_json, write_json
from ..discovery.facts import RankFacts, facts_from_json, to_json
from .meeting import Attendance, Meeting, Verdict, verdict_from_json

_POLL = 0.1
"""Seconds between two looks. NFS clients may see a new file some seconds late anyway."""


def meet(meeting: Meeting, facts: RankFacts, attendance: Attendance) -> Verdict:
    """Exchange facts through rendezvous/ in the run directory. Raises RendezvousError when late."""
    directory = meeting.directory
    directory.mkdir(mode=0o700, exist_ok=True)
    if meeting.rank == 0:
        (directory / "verdict.json").unlink(missing_ok=True)
        verdict = _collect(meeting, facts, attendance)
        write_json(
            directory / "verdict.json", {"attempt": meeting.attempt, "verdict": msgspec.to_builtins(verdict)}
        )
        return verdict
    write_json(directory / f"{meeting.rank}.json", {"attempt": meeting.attempt, "facts": to_json(facts)})
    while meeting.left() > 0:
        verdict_json = _of_attempt(meeting, directory / "verdict.json")
        if verdict_json is not None:
            return verdict_from_json(verdict_json["verdict"])
        attendance.look()
        time.sleep(_POLL)
    raise meeting.missing()


def _collect(meeting: Meeting, own: RankFacts, attendance: Attendance) -> Verdict:
    directory = meeting.directory
    found = {0: own}
    while len(found) < meeting.size:
        # Listing the directory makes an NFS client fetch its attributes again.
        names = set(os.listdir(directory))
        for rank in range(meeting.size):
            if rank not in found and f"{rank}.json" in names:
                entry = _of_attempt(meeting, directory / f"{rank}.json")
                if entry is not None:
                    found[rank] = facts_from_json(entry["facts"])
        try:
            attendance.look()
        except RendezvousError as error:
            return Verdict.of(error)
        if len(found) < meeting.size:
            if meeting.left() <= 0:
                return Verdict.of(meeting.missing())
            time.sleep(_POLL)
    attendance.record()
    return meeting.conclude(found.values())


def _of_attempt(meeting: Meeting, path: Any) -> dict[str, Any] | None:
    try:
        entry = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(entry, dict):
        raise RendezvousError(
            f"{path} is not what a rank writes", hint="is another program using this directory?"
        )
    return entry if entry.get("attempt") == meeting.attempt else None
