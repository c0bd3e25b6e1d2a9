"""When and why a run ends: walltime, signals, the command line, the stop file."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

from ...plan.plan import Plan

_POLL = 1.0
_SIGNAL_EARLY = 120.0
"""Slurm may send the walltime's signal up to a minute early, and the job script adds a margin."""
KILL_MARGIN = 5.0
"""Seconds of KillWait that are left for the processes between an engine and Slurm."""
ECHO = 1.5
"""One `scancel` may reach a process twice, from slurmd and from the job script: signals that come so
close, in seconds, are one."""


class Echoes:
    """Tells signals from their echoes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first = -math.inf

    def again(self) -> bool:
        """True when this signal is the echo of one that was already counted."""
        now = self._clock()
        if now - self._first < ECHO:
            return True
        self._first = now
        return False


class Ending:
    """Collects the reasons to end; the first one drains, a second one by hand forces."""

    def __init__(self, plan: Plan, end_time: float | None, stop_file: Path) -> None:
        self._plan = plan
        self.end_time = end_time
        """Unix seconds at which the walltime is over; None when there is none or nobody says."""
        self._stop_file = stop_file
        self.asked = asyncio.Event()
        self.reason: str | None = None
        self.forced = False
        self._echoes = Echoes()
        # Time limits run on the monotonic clock: a clock that is set back must not prolong them.
        self._cut = math.inf
        self._killed = math.inf

    def until(self) -> float:
        """Unix seconds at which running requests are cut."""
        return time.time() + self._cut - time.monotonic()

    def draining(self) -> bool:
        """May running requests still go on?"""
        return not self.forced and time.monotonic() < self._cut

    def grace(self) -> float:
        """Seconds the engines get between SIGTERM and SIGKILL; less when Slurm kills before."""
        if self.forced:
            return 0.0
        grace = self._plan.site.slurm.kill_wait - KILL_MARGIN
        return max(1.0, min(grace, self._killed - time.monotonic() - KILL_MARGIN))

    def drain(self) -> None:
        """`POST /drain`: running requests get the plan's time. Once draining, nothing changes."""
        self._ask("somebody asked for it", self._plan.model.drain)

    def finish(self, reason: str) -> None:
        """What the run was for is over."""
        self._ask(reason, self._plan.model.drain)

    def stop(self) -> None:
        """`POST /stop`: the first drains, the second forces."""
        self._ask_or_force("somebody asked for it", self._plan.model.drain)

    def on_signal(self, number: signal.Signals) -> None:
        if self._echoes.again():
            return
        if number == signal.SIGUSR1:
            # What the job script sends in the place of SIGTERM where srun is in between.
            number = signal.SIGTERM
        drain = float(self._plan.model.drain)
        if self._near_the_end():
            self._ask_or_force("the walltime ends", drain)
            return
        if self._plan.site.scheduler == "slurm" and not self.asked.is_set():
            # scancel or preemption: KillWait later everything is killed.
            drain = min(drain, self._plan.site.slurm.kill_wait / 2)
            self._killed = time.monotonic() + self._plan.site.slurm.kill_wait
        self._ask_or_force(f"signal {number.name}", drain)

    async def watch(self) -> None:
        """Look for the stop file and at the clock."""
        while True:
            # In a thread: a file system that hangs must not stop the heartbeats.
            if await asyncio.to_thread(self._stop_file.exists):
                self._ask("the file `stop` is in the run directory", self._plan.model.drain)
            if self.end_time is not None and time.time() >= self._drain_at(self.end_time):
                self._ask("the walltime ends", self._plan.model.drain)
            await asyncio.sleep(_POLL)

    def _drain_at(self, end: float) -> float:
        # A short walltime must not begin with its own drain; the signal Slurm sends is bound the same way.
        return end - min(self._plan.model.drain + self._margin(), self._plan.walltime * 0.75)

    def _margin(self) -> float:
        """Seconds before the end of the walltime at which the engines are told to stop."""
        return min(float(self._plan.site.slurm.kill_wait), self._plan.walltime * 0.25)

    def _near_the_end(self) -> bool:
        if self.end_time is None:
            return False
        needed = self._plan.model.drain + self._margin() + _SIGNAL_EARLY
        return self.end_time - time.time() < min(needed, self._plan.walltime * 0.75 + 1.0)

    def _ask_or_force(self, reason: str, drain: float) -> None:
        if self.asked.is_set():
            self.forced = True
        self._ask(reason, drain)

    def _ask(self, reason: str, drain: float) -> None:
        if self.asked.is_set():
            return
        self.reason = reason
        if self.end_time is not None:
            drain = min(drain, self.end_time - self._margin() - time.time())
        self._cut = time.monotonic() + max(0.0, drain)
        self.asked.set()
