"""Writes down what every key used, in the supervisor: one file per run, one writer per file.

It survives the router and the job: a router that starts again goes on where the file ends.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import StorageError
from ...rundir.atomic import file_mode, storage_error, write_text
from .usage_file import HOUR, SUFFIX, RunUsage, Time, UsageConfig, Used, encode, read

log = logging.getLogger(__name__)

_TICK = 1.0
_FLUSH_EVERY = 5.0
_OTHERS_EVERY = 30.0
_GROWTH = 1 << 20
"""Bytes appended after which the file is written anew, one line per figure."""


class Ledger:
    """One run's figures. Storage that fails is warned of, and tried again: it costs nobody an answer."""

    def __init__(self, config: UsageConfig, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._gpus = config.gpus
        self._path = Path(config.directory) / f"{config.run}{SUFFIX}"
        self._usage = RunUsage()
        self._dirty: dict[tuple[object, ...], Used | Time] = {}
        """Not written yet."""
        self._lock = threading.Lock()
        self._appended = 0
        self._whole = False
        """The file is to be written anew: it has grown, or it lacks what a failing storage did not take."""
        self._unread = False
        """What the file has from before could not be read: before that, writing it would lose it."""
        self._warned = False
        self._others: dict[str, tuple[tuple[int, int], dict[str, int]]] = {}
        self._told: Mapping[str, int] = {}
        self._from_start = config.started is not None
        """Time is counted from the job's start, also what a router before this one has counted."""
        self._until = config.started if config.started is not None else now()
        self._load()

    def _load(self) -> None:
        found = self._read_own()
        if found is None:
            self._unread = True
            return
        self._usage = found
        self._whole = True
        last = max((entry.until for entry in found.times.values()), default=0.0)
        # The same job: the time without a router was paid for as well. Another job: the time between was not.
        self._until = max(self._until, last)
        self._read_others()

    def _read_own(self) -> RunUsage | None:
        """What the file has; None where that can't be known now."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            found, warnings = read(self._path)
        except FileNotFoundError:
            return RunUsage()
        except OSError as error:
            self._fail(storage_error(error, "make the directory of usage"))
            return None
        except StorageError as error:
            self._fail(error)
            return None
        for warning in warnings:
            log.warning("%s", warning)
        return found

    def _join(self, found: RunUsage | None) -> None:
        """Add what the file had when we started, which could not be read then."""
        if found is None:
            return
        self._unread = False
        for old in found.used.values():
            used = self._usage.used.setdefault((old.hour, old.key, old.model), old)
            if used is not old:
                used.requests += old.requests
                used.prompt += old.prompt
                used.cached += old.cached
                used.completion += old.completion
        for before in found.times.values():
            time = self._usage.times.setdefault(before.hour, before)
            if time is not before:
                time.up = max(time.up, before.up) if self._from_start else time.up + before.up
                time.busy = min(time.busy + before.busy, time.up)
                time.until = max(time.until, before.until)

    def add(self, items: Iterable[Sequence[Any]]) -> None:
        """A relay's `Meter.take()`."""
        hour = int(self._now()) // HOUR * HOUR
        for key, name, model, requests, prompt, cached, completion in items:
            used = self._usage.used.get((hour, key, model))
            if used is None:
                used = self._usage.used[hour, key, model] = Used(hour=hour, key=key, name=name, model=model)
            used.requests += requests
            used.prompt += prompt
            used.cached += cached
            used.completion += completion
            self._dirty[hour, key, model] = used

    def tick(self, *, busy: bool) -> None:
        """Count the time since the last call, as time with requests or without."""
        now = self._now()
        for hour, seconds in _by_hour(self._until, now):
            entry = self._usage.times.get(hour)
            if entry is None:
                entry = self._usage.times[hour] = Time(hour=hour, gpus=self._gpus, until=now)
            entry.gpus = self._gpus
            entry.until = now
            entry.up += seconds
            entry.busy += seconds if busy else 0.0
            if busy or entry.up - seconds <= 0.0 or int(now) // 60 != int(now - seconds) // 60:
                # An idle run writes a line a minute.
                self._dirty[(hour,)] = entry
        self._until = max(self._until, now)

    def totals(self) -> dict[str, int]:
        """Tokens of every key, in this run and in the others of the directory."""
        totals = self._usage.totals()
        for _, other in self._others.values():
            for key, tokens in other.items():
                totals[key] = totals.get(key, 0) + tokens
        return totals

    async def run(self, *, busy: Callable[[], bool], tell: Callable[[Mapping[str, int]], None]) -> None:
        """Until cancelled: count time, write, and `tell` the totals at first and when they have changed."""
        flushed = looked = time.monotonic()
        while True:
            totals = self.totals()
            if totals != self._told:
                self._told = totals
                tell(totals)
            await asyncio.sleep(_TICK)
            self.tick(busy=busy())
            now = time.monotonic()
            if now - flushed >= _FLUSH_EVERY:
                flushed = now
                if self._unread:
                    self._join(await asyncio.to_thread(self._read_own))
                if not self._unread:
                    await asyncio.to_thread(self._write, *self._take())
            if now - looked >= _OTHERS_EVERY:
                looked = now
                await asyncio.to_thread(self._read_others)

    def flush(self) -> None:
        """Write now."""
        if self._unread:
            self._join(self._read_own())
        if not self._unread:
            self._write(*self._take())

    def close(self) -> None:
        """Write what is left."""
        for entry in list(self._usage.times.values())[-1:]:
            self._dirty[(entry.hour,)] = entry
        self.flush()

    def _take(self) -> tuple[bytes, bool]:
        """What to write, as bytes since figures change while a thread writes; and is it the whole file?"""
        whole = self._whole or self._appended >= _GROWTH
        lines = encode(self._usage.lines() if whole else self._dirty.values())
        self._dirty.clear()
        return lines, whole

    def _write(self, lines: bytes, whole: bool) -> None:
        with self._lock:
            try:
                if whole:
                    write_text(self._path, lines.decode())
                    self._appended = 0
                elif lines:
                    self._append(lines)
            except OSError as error:
                self._fail(storage_error(error, "append to"))
            except StorageError as error:
                self._fail(error)
            else:
                self._whole = False
                if self._warned:
                    self._warned = False
                    log.warning("usage is written down again, and nothing of it was lost")

    def _append(self, lines: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.fchmod(file, file_mode(self._path.parent))
            if os.write(file, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            os.fsync(file)
        finally:
            os.close(file)
        self._appended += len(lines)

    def _read_others(self) -> None:
        """Other runs' totals: those that end add to the same keys, and so do those that run beside us."""
        found: dict[str, tuple[tuple[int, int], dict[str, int]]] = {}
        try:
            with os.scandir(self._path.parent) as entries:
                for entry in entries:
                    if not entry.name.endswith(SUFFIX) or entry.name == self._path.name:
                        continue
                    status = entry.stat()
                    version = (status.st_mtime_ns, status.st_size)
                    known = self._others.get(entry.name)
                    if known is None or known[0] != version:
                        known = (version, read(Path(entry.path))[0].totals())
                    found[entry.name] = known
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("what keys used in other runs is not known: %s", error)
            return
        except StorageError as error:
            log.warning("what keys used in other runs is not known: %s (%s)", error.message, error.hint)
            return
        # Files of old runs may be removed to save space; what was used stays used while we run.
        self._others = self._others | found

    def _fail(self, error: StorageError) -> None:
        self._whole = True
        if not self._warned:
            self._warned = True
            log.warning("usage is not written down for now: %s (%s)", error.message, error.hint)


def _by_hour(start: float, end: float) -> Iterator[tuple[int, float]]:
    """The seconds from `start` to `end` that lie in each hour."""
    while start < end:
        hour = int(start) // HOUR * HOUR
        upto = min(end, hour + HOUR)
        yield hour, upto - start
        start = upto
