"""The run's event log as the in-job programs write it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import StorageError
from ..rundir.events import Event, EventLog, read_events
from .console import warn
from .head.walltime import end_time
from .inputs import Inputs

LAST = ("failed", "stopped")
"""Every attempt ends with exactly one of these."""


class Journal:
    """Events of a run that goes on when they can't be written: one warning, and the number that got lost."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._lost = 0

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; never fails."""
        try:
            if self._lost:
                message = f"{self._lost} events are missing here: events.jsonl could not be written"
                self._log.write("warning", message=message, hint="free space on the shared file system")
                self._lost = 0
            self._log.write(event, **fields)
        except StorageError as error:
            if not self._lost:
                warn(f"{error.message}; the run goes on without a record of what happens", error.hint)
            self._lost += 1


@contextmanager
def open_journal(inputs: Inputs) -> Iterator[Journal]:
    """Raises StorageError when there can be no event log at all."""
    log = EventLog(inputs.run.events)
    try:
        yield Journal(log)
    finally:
        log.close()


def note_job_started(inputs: Inputs, journal: Journal) -> Event:
    """This attempt's `job-started`, written unless it has one: a fallback runs the rendezvous twice."""
    found = job_started(inputs)
    if found is not None:
        return found
    fields = {
        "node": socket.gethostname(),
        "slurm_job_id": inputs.environ.get("SLURM_JOB_ID"),
        "end_time": walltime_end(inputs),
        "attempt": inputs.attempt,
    }
    journal.write("job-started", **fields)
    return {"t": round(time.time(), 3), "event": "job-started", **fields}


def job_started(inputs: Inputs) -> Event | None:
    """This attempt's `job-started`; None while it has none."""
    return next((event for event in this_attempt(inputs) if event["event"] == "job-started"), None)


def this_attempt(inputs: Inputs) -> list[Event]:
    """What happened since this attempt's job-started; nothing before it was written."""
    found: list[Event] = []
    for event, _ in read_events(inputs.run.events):
        if event["event"] == "job-started":
            found = []
            if event.get("attempt") != inputs.attempt:
                continue
        elif not found:
            continue
        found.append(event)
    return found


def walltime_end(inputs: Inputs) -> float | None:
    """Unix time at which the walltime is over. Without Slurm the plan's walltime counts from now."""
    told = end_time(inputs.environ)
    if told is None and inputs.plan.site.scheduler == "local":
        return round(time.time() + inputs.plan.walltime, 3)
    return told
