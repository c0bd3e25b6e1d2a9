"""Carries a batch out on an endpoint: takes rows, keeps as many in flight as is good, and journals what
comes.

One process, one journal, one event loop. It ends when nothing is left to do, when its time is up, when too
much goes wrong, or when it is told to; whatever it had not journalled then is done again by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import RunError, TooManyErrors
from ..http.client import Pool
from ..http.errors import UpstreamError
from . import sending
from .admission import Budget, parse
from .journal import Entry, Kind
from .progress import Progress
from .rows import HOPELESS, Queue, Row, pause
from .sending import Endpoint, Outcome
from .work import Work

log = logging.getLogger(__name__)

ERROR_RATE = 0.5
"""Part of the results that may be errors, where nobody says."""
_CANARY = 20
_MOST_ROWS = 8192
"""In flight at once: each takes two sockets of the router."""
_ATTEMPTS = 6
_SYNC_EVERY, _SYNC_BYTES = 2.0, 1 << 20
_STEER_EVERY = 1.0
_BEAT_EVERY = 30.0
_LOOK_EVERY = 2.0
_ASK_EVERY = 20.0
_MARGIN = 20.0
"""Seconds before the walltime's end by which all is on the disk."""
_PATIENCE = 600.0
"""Seconds for which an endpoint may be away."""

Ended = Literal["complete", "others", "more"]
"""`others`: what is left is in the hands of other jobs. `more`: there is more to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to give up."""

    error_rate: float
    """Part of the results that may be errors, once there are _CANARY of them."""


class Driver:
    def __init__(self, work: Work, endpoint: Endpoint, progress: Progress, limits: Limits) -> None:
        self._work = work
        self._endpoint = endpoint
        self._progress = progress
        self._limits = limits
        self._pool = Pool(idle_per_origin=_MOST_ROWS)
        self._budget = Budget()
        self._queue = Queue(self._fresh)
        self._running: dict[asyncio.Task[None], Row] = {}
        self._changed = asyncio.Event()
        self._workers = 1
        self._away_since: float | None = None
        self._hold_until = 0.0
        """Event loop time before which nothing is sent: the endpoint is away, or has no room."""
        self._why_ending: str | None = None
        self._postponed: set[int] = set()
        """Items that can't be finished before the job ends."""
        self.out_of_walltime = False
        """It stops since the run ends soon."""
        self._fatal: BaseException | None = None
        self._slowest = 1.0
        """Seconds: what nearly all requests take less than."""

    async def run(self) -> Ended:
        """Until there is nothing more to do, or no more time. Raises what made it stop: StorageError,
        RunError, TooManyErrors."""
        watch = [
            asyncio.create_task(self._every(_STEER_EVERY, self._steer)),
            asyncio.create_task(self._every(_SYNC_EVERY / 4, self._sync)),
            asyncio.create_task(self._every(_BEAT_EVERY, self._work.members.beat)),
            asyncio.create_task(self._every(_ASK_EVERY, self._ask_after_others)),
            asyncio.create_task(self._every(_LOOK_EVERY, self._look_for_stop)),
            asyncio.create_task(self._every(self._progress.every, self._show)),
        ]
        try:
            return await self._feed()
        finally:
            for task in (*watch, *self._running):
                task.cancel()
            await asyncio.gather(*watch, *self._running, return_exceptions=True)
            await self._pool.close()

    def stop(self, why: str) -> None:
        """Begin nothing more; `run()` returns when what is in flight is through, or its time."""
        if self._why_ending is None:
            self._why_ending = why
            self._progress.note(f"stopping: {why}")
            self._changed.set()

    async def _feed(self) -> Ended:
        while True:
            self._changed.clear()
            if self._fatal is not None:
                raise self._fatal
            self._look_at_clock()
            if self._why_ending is None:
                self._start_rows()
                if not self._running and not self._queue.waiting and self._queue.used_up:
                    ended = await self._round_over()
                    if ended is not None:
                        return ended
                    continue
            elif not self._running or self._out_of_time():
                return "more" if self._work.tally.left else "complete"
            try:
                async with asyncio.timeout(self._nap()):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _start_rows(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._hold_until:
            return
        most = _MOST_ROWS if self._progress.results >= _CANARY else _CANARY
        while len(self._running) < most:
            row = self._queue.peek(now, len(self._running))
            if row is None or not self._budget.fits(self._cost(row), self._workers):
                return
            if row.alone and self._running:
                return
            self._queue.pop(row)
            row.tokens = self._cost(row)
            self._budget.enter(row.tokens)
            task = asyncio.create_task(self._send(row))
            self._running[task] = row
            task.add_done_callback(self._landed)
            if row.alone:
                return

    def _cost(self, row: Row) -> float:
        return row.request.prompt_tokens + self._progress.expected_output(row.request.most)

    def _fresh(self) -> Iterator[Row] | None:
        items = self._work.take()
        if items is None:
            self._progress.tail = time.time()
            return None
        self._progress.tail = None
        deaths = self._work.tally.deaths
        if self._postponed:
            items = items[~np.isin(items, list(self._postponed))]
        return (Row(request, deaths=deaths.get(request.item, 0)) for request in self._work.requests(items))

    async def _round_over(self) -> Ended | None:
        """All that this one took is done. None: there is more to take."""
        work = self._work
        await asyncio.to_thread(work.members.refresh)
        work.tally.look(but=work.journal.epoch)
        if not work.tally.left:
            return "complete"
        settled = work.tally.done
        if self._postponed:
            settled = settled.copy()
            settled[list(self._postponed)] = True
            if settled.all():
                return "more"
        if work.claims.renew(settled):
            self._queue.used_up = False
            return None
        return "others"

    # One row

    async def _send(self, row: Row) -> None:
        began = time.monotonic()
        outcome = await sending.send(self._pool, self._endpoint, row.request.path, row.request.body)
        self._settle(row, outcome, time.monotonic() - began)

    def _landed(self, task: asyncio.Task[None]) -> None:
        row = self._running.pop(task)
        self._budget.leave(row.tokens)
        self._queue.landed(row)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fatal = self._fatal or error
        self._changed.set()

    def _settle(self, row: Row, outcome: Outcome, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        if outcome.code != "endpoint":
            self._away_since = None
        match outcome.fate:
            case "answer":
                row.attempts += 1
                self._slowest = max(seconds, 0.999 * self._slowest)
                self._write(row, outcome, Kind.ANSWER)
            case "error":
                row.attempts += 1
                self._write(row, outcome, Kind.ERROR)
            case "again":
                row.attempts += 1
                if row.attempts >= _ATTEMPTS:
                    self._write(row, outcome, Kind.ERROR)
                else:
                    self._progress.retried(outcome)
                    self._queue.back(row, now + max(outcome.pause, pause(row.attempts)))
            case "wait":
                self._wait(row, outcome, now)
            case "died":
                self._died(row, outcome)
            case "too_late":
                self._postpone(row)
            case "ending":
                self._queue.back(row, now)
                # A router that drains says why the head does.
                self.out_of_walltime |= "walltime" in (outcome.code, *outcome.message.split())
                self.stop(outcome.message)
            case "refused":
                raise RunError(
                    f"the endpoint refuses the batch: HTTP {outcome.status}: {outcome.message}",
                    hint="its key may have been revoked, or may not use this model",
                )

    def _postpone(self, row: Row) -> None:
        """Leave it to the next job; shorter rows may still be finished in this one."""
        if not self._postponed:
            self._progress.note("rows that would take longer than this job has left are for the next one")
        self.out_of_walltime = True
        self._postponed.add(row.request.item)

    def _wait(self, row: Row, outcome: Outcome, now: float) -> None:
        self._queue.back(row, now + max(outcome.pause, pause(0)))
        if outcome.status == 429:
            self._budget.cut()
            return
        if outcome.code == "worker_connect":
            return  # one engine is gone: the router hears of it, and the others go on
        self._hold_until = max(self._hold_until, now + 1.0)
        if outcome.code == "endpoint":
            self._away_since = self._away_since or now
            if now - self._away_since > _PATIENCE:
                self.stop(f"the endpoint has not answered for {_PATIENCE:g} s: {outcome.message}")
            self._endpoint.find_if_there()

    def _died(self, row: Row, outcome: Outcome) -> None:
        row.deaths += 1
        self._journal(Entry(item=row.request.item, kind=Kind.DEATH, attempts=row.attempts))
        self._work.tally.mark(row.request.item, Kind.DEATH)
        self._progress.retried(outcome)
        if row.deaths >= HOPELESS:
            text = f"{row.deaths} engines died while this row ran on them, the last one with it alone"
            self._write(row, Outcome("error", outcome.status, code="engine_died", message=text), Kind.ERROR)
        else:
            self._queue.died(row)

    def _write(self, row: Row, outcome: Outcome, kind: Kind) -> None:
        answered = kind is Kind.ANSWER
        self._journal(
            Entry(
                item=row.request.item, kind=kind, attempts=row.attempts, status=outcome.status,
                request_id=outcome.request_id, body=sending.raw(outcome.body),
                error=None if answered else (outcome.code, outcome.message[:2000]),
                prompt_tokens=outcome.prompt_tokens, output_tokens=outcome.output_tokens,
            )
        )  # fmt: skip
        self._work.tally.mark(row.request.item, kind)
        self._progress.result(outcome, row.attempts, answered=answered)
        self._check_errors()

    def _journal(self, entry: Entry) -> None:
        self._work.journal.append(entry)

    def _check_errors(self) -> None:
        seen = self._progress
        if seen.results >= _CANARY and seen.errors > self._limits.error_rate * seen.results:
            raise TooManyErrors(
                f"{seen.errors} of {seen.results} rows failed, more than --max-error-rate allows"
                f" ({self._limits.error_rate:.0%}):\n{seen.first_errors()}",
                hint="what was answered is kept; when the cause is mended, the same command sends the rows"
                " that failed again; a higher --max-error-rate takes their errors for results",
            )

    # Time

    def _look_at_clock(self) -> None:
        end = self._endpoint.end_time
        if end is not None and end - time.time() < self._slowest + _MARGIN:
            self.out_of_walltime = True
            self.stop("the walltime ends")

    def _out_of_time(self) -> bool:
        end = self._endpoint.end_time
        return end is not None and end - time.time() < _MARGIN

    def _nap(self) -> float:
        """Seconds until something may have to be done that nothing else announces."""
        now = asyncio.get_running_loop().time()
        due = self._queue.due
        times = [now + 1.0, self._hold_until] + ([] if due is None else [due])
        return max(0.01, min(at for at in times if at >= now) - now)

    async def _every(self, seconds: float, act: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                made = act()
                if asyncio.iscoroutine(made):
                    await made
            except Exception as error:
                # run() raises it: a journal that nobody syncs any more must not go on in silence.
                self._fatal = self._fatal or error
                self._changed.set()
                return

    async def _steer(self) -> None:
        try:
            engines, queued = parse(await sending.metrics(self._pool, self._endpoint))
        except (UpstreamError, TimeoutError) as error:
            log.info("the endpoint's metrics are not to be had: %s", error)
            return
        self._workers = max(1, len(engines))
        self._budget.steer(engines, queued)
        self._progress.seen(engines, queued, self._budget.limit)
        self._changed.set()

    async def _sync(self) -> None:
        """The journal goes to the disk every two seconds, or every megabyte."""
        journal = self._work.journal
        now = time.monotonic()
        if not journal.unsynced or (journal.unsynced < _SYNC_BYTES and now - self._synced < _SYNC_EVERY):
            return
        self._synced = now
        await asyncio.to_thread(journal.sync)

    _synced = 0.0

    async def _ask_after_others(self) -> None:
        # In a thread: a Slurm that is slow to answer must not hold up the rows.
        await asyncio.to_thread(self._work.members.refresh)
        if len(self._work.members.living()) > 1:
            self._work.tally.look(but=self._work.journal.epoch)

    def _look_for_stop(self) -> None:
        if self._work.dir.stop.exists():
            self.stop("somebody asked it to")

    def _show(self) -> None:
        self._progress.show(self._work, self._endpoint.end_time, in_flight=len(self._running))
