"""Watches a launch until it is READY or over, and shows the ladder: redrawn on a terminal, else as lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .. import slurm
from ..errors import RunError
from ..plan.plan import Plan
from ..rundir.atomic import read_json, storage_error
from ..rundir.events import read_events
from ..rundir.runs import Run
from ..slurm.watch import Watch
from .ladder import Progress, Rung, begin, duration, fold, rungs, with_joined
from .output import coloured, paint, say, warn

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_GLANCE = 0.25
"""Seconds between two looks at the run directory; the scheduler is asked far less often."""
_LAST_WORDS = 3.0
"""Seconds that the events of a job that is over have to reach this host."""
_LINE_EVERY = 10.0
"""Seconds between two lines about the same rung."""
_MARKS = {"done": ("✓", "green"), "now": ("…", "cyan"), "failed": ("✗", "red"), "ahead": (" ", "cyan")}


class View(Protocol):
    def show(self, progress: Progress, now: float) -> None:
        """Called again and again; shows what is new."""


class Lines:
    """One line per news, for pipes, logs and CI."""

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._text: dict[str, tuple[str, float]] = {}
        self._warnings = 0

    def show(self, progress: Progress, now: float) -> None:
        for message, hint in progress.warnings[self._warnings :]:
            warn(message, hint)
        self._warnings = len(progress.warnings)
        for rung in rungs(progress, now):
            if rung.state == "done" and rung.name not in self._done:
                self._done.add(rung.name)
                self._line(progress, rung, now if rung.at is None else rung.at)
            elif rung.state == "failed" and rung.name not in self._failed:
                self._failed.add(rung.name)
                self._line(progress, rung, now)
            elif rung.state == "now" and rung.text and self._is_news(rung, now):
                self._line(progress, rung, now)

    def _is_news(self, rung: Rung, now: float) -> bool:
        text, when = self._text.get(rung.name, ("", -_LINE_EVERY))
        if rung.text == text or now - when < _LINE_EVERY:
            return False
        self._text[rung.name] = (rung.text, now)
        return True

    def _line(self, progress: Progress, rung: Rung, when: float) -> None:
        mark, colour = _MARKS[rung.state]
        text = f": {rung.text}" if rung.text else ""
        since = duration(when - progress.submitted)
        say(f"{since:>8} {paint(mark, colour, sys.stderr)} {rung.name}{text}")


class Redrawn:
    """All rungs, redrawn in place."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._warnings = 0

    def show(self, progress: Progress, now: float) -> None:
        for message, hint in progress.warnings[self._warnings :]:
            self._live.console.print(f"warning: {message}", style="yellow", markup=False)
            if hint:
                self._live.console.print(f"hint: {hint}", style="cyan", markup=False)
        self._warnings = len(progress.warnings)
        self._live.update(self._text(progress, now))

    def _text(self, progress: Progress, now: float) -> Text:
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis")
        for rung in rungs(progress, now):
            mark, colour = _MARKS[rung.state]
            moment = rung.at if rung.at is not None else now if rung.state == "now" else None
            since = "" if moment is None else duration(moment - progress.submitted)
            text.append(f"{since:>8} ")
            text.append(mark, style=colour)
            text.append(f" {rung.name:<16} ", style="dim" if rung.state == "ahead" else "")
            text.append(f"{rung.text}\n", style="dim" if rung.state == "ahead" else "")
        return text


@contextmanager
def view() -> Iterator[View]:
    """The way that suits stderr."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Lines()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, no_color=not coloured(sys.stderr), highlight=False)
    with Live(console=console, refresh_per_second=4) as live:
        yield Redrawn(live)


def follow(run: Run, plan: Plan, shown: View) -> Progress:
    """Look until the launch is READY or over. Raises SlurmError when asking can't work."""
    job_id = run.record.job_id or ""
    local = run.record.scheduler == "local"
    watch = Watch(slurm.get("local" if local else "slurm"), [job_id], shortest=0.5 if local else 2.0)
    progress = begin(plan, run.record.created)
    offset = 0
    over_since: float | None = None
    outage = False
    while True:
        job = watch.poll().get(job_id)
        if (watch.outage is not None) != outage:
            outage = watch.outage is not None
            if watch.outage is not None:
                warn(watch.outage.message, "the job is not affected; asking again")
        events = list(read_events(run.directory.events, offset))
        offset = events[-1][1] if events else offset
        now = time.time()
        progress = fold(_with_job(progress, job), [event for event, _ in events])
        progress = with_joined(progress, joined(run), now)
        shown.show(progress, now)
        told = progress.ready or progress.failed or progress.stopped
        if told:
            return progress
        if progress.finished:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > _LAST_WORDS:
                return progress
        time.sleep(_GLANCE)


def _with_job(progress: Progress, job: slurm.JobState | None) -> Progress:
    return progress if job is None else replace(progress, job=job)


def joined(run: Run) -> dict[int, str]:
    """Rank -> node of the ranks that have written their file."""
    found: dict[int, str] = {}
    try:
        names = os.listdir(run.directory.ranks)
    except FileNotFoundError as error:
        raise RunError(
            f"the run directory {run.directory.path} is gone",
            hint=f"if its job {run.record.job_id} still runs, end it by its id",
        ) from error
    except OSError as error:
        raise storage_error(error, "list") from error
    for name in names:
        rank = name.removesuffix(".json")
        if rank.isdigit() and name != rank:
            entry = read_json(run.directory.ranks / name)
            found[int(rank)] = str(entry.get("node", "?")) if isinstance(entry, dict) else "?"
    return found
