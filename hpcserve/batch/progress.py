"""How a batch goes: totals of this job, what is expected of answers, and what is shown of it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, TextIO

from ..rundir.atomic import write_json
from .admission import EngineLoad
from .course import Course
from .pools import Use, look
from .sending import Outcome
from .work import Work

_UNKNOWN_ANSWER = 256.0
"""Tokens, before any answer came and where the request does not bound it."""
_DISTINCT_ERRORS = 10
_LINES_EVERY = 10.0
"""Seconds between two lines where nobody watches a terminal."""
_SUMMED_EVERY = 60.0
"""Seconds between two sums over all items, which may be ten million."""
_WINDOW = 300.0
"""Seconds over which the present rate is taken."""


class Progress:
    """Counts, from the start of this job's driver."""

    def __init__(self, terminal: TextIO = sys.stderr) -> None:
        self._terminal = terminal
        self._is_tty = terminal.isatty()
        self.every = 1.0
        """Seconds between two calls of show()."""
        self._told = 0.0
        self.began = time.time()
        self.first_result: float | None = None
        self.last_result: float | None = None
        self.tail: float | None = None
        """When there was no more row to begin with."""
        self.results = 0
        self.errors = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.attempts: Counter[int] = Counter()
        """Results, by how many answers it took."""
        self.finish_reasons: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.engine_load: dict[str, tuple[float, float]] = {}
        """Role -> requests that run, and that wait."""
        self.pools: dict[str, Use] = {}
        self.course = Course(self.began)
        self._errors: Counter[str] = Counter()
        self._answers = 0
        self._mean_answer = _UNKNOWN_ANSWER
        self._rates: list[tuple[float, int, int]] = []
        self._in_flight = 0
        self._prompts: tuple[float, int, float] | None = None
        """When their tokens were summed, and the items and tokens that were left then."""
        self._budget: float | None = None
        self._shown = 0

    def expected_output(self, most: int) -> float:
        """Tokens that an answer of at most `most` (0: not bounded) will probably have."""
        if not self._answers and most:
            return float(most)
        return min(self._mean_answer, most) if most else self._mean_answer

    def result(self, outcome: Outcome, attempts: int, *, answered: bool) -> None:
        now = time.time()
        self.first_result = self.first_result or now
        self.last_result = now
        self.results += 1
        self.attempts[attempts] += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.output_tokens += outcome.output_tokens
        if not answered:
            self.errors += 1
            self._count_error(outcome)
            return
        self.finish_reasons[outcome.finish_reason or "none"] += 1
        self._answers += 1
        self._mean_answer += (outcome.output_tokens - self._mean_answer) / min(self._answers, 200)

    def _count_error(self, outcome: Outcome) -> None:
        text = f"{outcome.code}: {outcome.message[:300]}"
        if text in self._errors or len(self._errors) < _DISTINCT_ERRORS:
            self._errors[text] += 1

    def first_errors(self) -> str:
        """The first ten distinct ones, a line each."""
        return "\n".join(f"  {count:6d}  {text}" for text, count in self._errors.items())

    def retried(self, outcome: Outcome) -> None:
        self.retries[outcome.code] += 1

    def seen(self, engines: Iterable[EngineLoad], queued: float, budget: float | None) -> None:
        """What the endpoint said a moment ago."""
        load: dict[str, tuple[float, float]] = {}
        engines = tuple(engines)
        if self.tail is None:
            look(self.pools, engines)
        for engine in engines:
            running, waiting = load.get(engine.role, (0.0, 0.0))
            load[engine.role] = (running + engine.running, waiting + engine.waiting)
        if queued:
            load["router"] = (0.0, queued)
        self.engine_load = load
        self._budget = budget

    def note(self, text: str) -> None:
        """A line for whoever watches."""
        self._clear()
        print(text, file=self._terminal, flush=True)

    def show(self, work: Work, end_time: float | None, *, in_flight: int) -> None:
        """Write status.json, and one line for whoever watches. Raises StorageError."""
        self._in_flight = in_flight
        self.course.note(time.time(), self.results, self.prompt_tokens + self.output_tokens)
        status = self.status(work, end_time)
        write_json(work.dir.status, status)
        text = line(status)
        if self._is_tty:
            self._clear()
            print(text, end="", file=self._terminal, flush=True)
            self._shown = len(text)
        elif time.time() - self._told >= _LINES_EVERY:
            self._told = time.time()
            print(text, file=self._terminal, flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\r" + " " * self._shown + "\r", end="", file=self._terminal, flush=True)
            self._shown = 0

    def status(self, work: Work, end_time: float | None) -> dict[str, Any]:
        """Everything that is known of the batch, for status.json."""
        now = time.time()
        items, left = work.manifest.items, work.tally.left
        tokens = self.prompt_tokens + self.output_tokens
        self._rates = [*(r for r in self._rates if r[0] > now - _WINDOW), (now, self.results, tokens)]
        first = self._rates[0]
        span = max(now - first[0], 1e-9)
        rows_rate = (self.results - first[1]) / span if now > first[0] else 0.0
        tokens_rate = (tokens - first[2]) / span if now > first[0] else 0.0
        members = work.members.living()
        # The others are taken to be as quick as this one.
        rate = tokens_rate * max(1, len(members))
        eta = self._tokens_left(work, left) / rate if rate > 0 else None
        walltime = None if end_time is None else max(0.0, end_time - now)
        return {
            "time": round(now, 3),
            "items": items,
            "done": items - left,
            "left": left,
            "this_job": {
                "member": work.members.me.name,
                "began": round(self.began, 3),
                "results": self.results,
                "errors": self.errors,
                "retries": dict(self.retries),
                "prompt_tokens": self.prompt_tokens,
                "output_tokens": self.output_tokens,
                "in_flight": self._in_flight,
                "token_budget": None if self._budget is None else round(self._budget),
                "rows_per_second": round(rows_rate, 2),
                "tokens_per_second": round(tokens_rate, 1),
            },
            "engines": {
                role: {"running": load[0], "waiting": load[1]} for role, load in self.engine_load.items()
            },
            "members": members,
            "eta_seconds": None if eta is None else round(eta),
            "walltime_left_seconds": None if walltime is None else round(walltime),
            "finishes_in_this_job": None if eta is None or walltime is None else eta < walltime,
        }

    def _tokens_left(self, work: Work, left: int) -> float:
        """Prompts as they were counted in planning, and answers by the mean of those that came."""
        now = time.time()
        if self._prompts is None or now - self._prompts[0] > _SUMMED_EVERY:
            prompts = float(work.spool.places["prompt"][~work.tally.done].sum())
            self._prompts = (now, left, prompts)
        _, then_left, prompts = self._prompts
        return prompts * left / max(1, then_left) + left * self._mean_answer


def line(status: dict[str, Any]) -> str:
    """What status.json says, for people."""
    job = status["this_job"]
    done = f"{status['done']:,}/{status['items']:,} rows"
    parts = [done, f"{job['rows_per_second']:,.1f} rows/s", f"{job['tokens_per_second']:,.0f} tok/s"]
    if job["errors"]:
        parts.append(f"{job['errors']:,} errors")
    parts.append(f"{job['in_flight']} in flight")
    if status["eta_seconds"] is not None:
        parts.append(f"ETA {_clock(status['eta_seconds'])}")
    if status["walltime_left_seconds"] is not None:
        parts.append(f"walltime left {_clock(status['walltime_left_seconds'])}")
    if status["finishes_in_this_job"] is not None:
        parts.append(f"finishes in this job: {'yes' if status['finishes_in_this_job'] else 'no'}")
    return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
