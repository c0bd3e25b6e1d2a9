"""Asks a scheduler about jobs, not more often than is polite, and through its outages."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import SlurmDown
from .scheduler import JobState, Scheduler


class Watch:
    """The states of a few jobs, in one question for all of them.

    The pause between two questions doubles from `shortest` to `longest` seconds while nothing
    changes, and falls back when something does. An outage keeps the last known states.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        job_ids: list[str],
        *,
        shortest: float = 2.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.states: dict[str, JobState] = {}
        self.outage: SlurmDown | None = None
        """Why the last question had no answer; None when it had."""
        self._scheduler = scheduler
        self._job_ids = job_ids
        self._shortest = shortest
        self._longest = longest
        self._pause = shortest
        self._clock = clock
        self._next = clock()

    def poll(self) -> dict[str, JobState]:
        """The states, asked for anew when it is time. Raises SlurmError when asking can't work."""
        if self._clock() < self._next:
            return self.states
        try:
            states = self._scheduler.state(self._job_ids)
        except SlurmDown as error:
            self.outage = error
            self._pause = min(self._pause * 2, self._longest)
        else:
            self.outage = None
            changed = _essence(states) != _essence(self.states)
            self._pause = self._shortest if changed else min(self._pause * 2, self._longest)
            self.states = states
        self._next = self._clock() + self._pause
        return self.states


def _essence(states: dict[str, JobState]) -> dict[str, tuple[str, str]]:
    """Without the estimate of the start, which moves all the time."""
    return {job: (state.state, state.reason) for job, state in states.items()}
