"""Carries batches out: each is planned, driven and finished by a task that any later process can go on with.

A batch's status is written down before what follows from it is begun, and each step may be done twice. So a
process that is killed loses nothing but the rows that were in flight.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO, cast

from ...errors import ConfigError, HpcserveError, RunError
from .. import history
from ..begin import BatchRequest, Model, begin
from ..driver import Driver, Ended, Limits
from ..finish import settle
from ..layout import BatchDir
from ..manifest import Manifest
from ..members import this_process
from ..merge import Unfinished
from ..progress import Progress
from ..sending import Endpoint
from ..work import Work, make_directory
from . import endings, validation
from .records import BatchRecord, Counts, FileRecord, LineError, Status
from .store import Store

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Batches that are driven at the same time. They share what interactive requests leave of the endpoint; the
others wait, the oldest first."""
_AGAIN = 10.0
"""Seconds before a step that could not be done is tried again."""
_NO_LIMIT = Limits(error_rate=1.0)
"""A batch whose every row fails is completed with so many errors, as OpenAI's are."""

Step = Literal["waiting", "planning", "driving", "finishing"]


@dataclass(slots=True)
class _Carried:
    """A batch in this process."""

    task: asyncio.Task[None] | None = None
    step: Step = "waiting"
    before: Counts = field(default_factory=Counts)
    """What processes before this one did."""
    driver: Driver | None = None
    progress: Progress | None = None


class Carrier:
    """`start()` goes on with all that is unfinished; `take()` begins with a new one."""

    def __init__(
        self, store: Store, endpoint: Path, *, model: str, revision: str | None, at_once: int = AT_ONCE
    ) -> None:
        """`model` is a hub id or a directory, whose tokenizer counts prompts."""
        self._store = store
        self._endpoint = endpoint
        self._model = model
        self._revision = revision
        self._carried: dict[str, _Carried] = {}
        self._planning = asyncio.Semaphore(1)
        self._driving = asyncio.Semaphore(at_once)

    def start(self) -> None:
        for batch in self._store.unfinished():
            self.take(batch)

    def take(self, batch: BatchRecord) -> None:
        carried = self._carried.setdefault(batch.id, _Carried())
        carried.step = "waiting"
        carried.task = asyncio.create_task(self._carry(batch, carried))

    async def cancel(self, batch: BatchRecord) -> None:
        """What is in flight is still answered. Raises StorageError."""
        batch.counts = self.counts(batch)
        batch.enter("cancelling")
        await self._store.save(batch)
        carried = self._carried[batch.id]
        if carried.driver is not None:
            carried.driver.stop("it was cancelled")
        elif carried.step == "waiting" and carried.task is not None:
            # For hours, perhaps, until others are through.
            carried.task.cancel()
            self.take(batch)

    def counts(self, batch: BatchRecord) -> Counts:
        """As of this moment."""
        carried = self._carried.get(batch.id)
        if batch.over or carried is None or carried.progress is None:
            return batch.counts
        before, now = carried.before, carried.progress
        return Counts(
            total=before.total,
            completed=before.completed + now.results - now.errors,
            failed=before.failed + now.errors,
        )

    async def close(self) -> None:
        """Leave everything as the next process can go on with it."""
        tasks = [carried.task for carried in self._carried.values() if carried.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, batch: BatchRecord, carried: _Carried) -> None:
        while not batch.over:
            carried.step = "waiting"
            try:
                if await self._advance(batch, carried):
                    continue
            except ConfigError as error:
                await self._fail(batch, validation.errors(error, self._input(batch)))
                continue
            except RunError as error:
                await self._refused(batch, error.message)
                continue
            except HpcserveError as error:
                log.error("%s: %s (%s)", batch.id, error.message, error.hint)
            except Exception:
                log.exception("%s: this is a bug", batch.id)
            carried.step = "waiting"
            await asyncio.sleep(_AGAIN)
        self._carried.pop(batch.id, None)

    async def _advance(self, batch: BatchRecord, carried: _Carried) -> bool:
        """Take one step; False: it has to be tried again, a little later."""
        match batch.status:
            case "validating":
                return await self._plan(batch, carried)
            case "in_progress":
                return await self._drive(batch, carried)
            case "finalizing":
                carried.step = "finishing"
                return await self._finish(batch, "completed")
        carried.step = "finishing"
        return await self._end(batch, "cancelled", "batch_cancelled", "the batch was cancelled")

    async def _plan(self, batch: BatchRecord, carried: _Carried) -> bool:
        async with self._planning:
            endpoint = await self._find(batch)
            if endpoint is None:
                return False
            carried.step = "planning"
            manifest = await asyncio.to_thread(self._begin, batch, endpoint.served_name)
            batch.model = endpoint.served_name
            batch.counts = Counts(total=manifest.items)
            if batch.status == "validating":
                batch.enter("in_progress")
            await self._store.save(batch)
        return True

    def _begin(self, batch: BatchRecord, served_name: str) -> Manifest:
        path = self._input(batch)
        validation.check(path, batch.endpoint)
        request = BatchRequest(inputs=[str(path)], output=self._store.dir.work(batch.id).out, format="openai")
        model = Model(served_name=served_name, path=self._model, revision=self._revision)
        return begin(request, model).manifest

    def _input(self, batch: BatchRecord) -> Path:
        # It is there: an input can't be deleted before its batch is over.
        return self._store.content(self._store.files[batch.input_file_id])

    async def _find(self, batch: BatchRecord) -> Endpoint | None:
        """None: the endpoint is not READY at the moment."""
        try:
            return await asyncio.to_thread(Endpoint, self._endpoint, batch.key)
        except RunError as error:
            log.info("%s waits: %s", batch.id, error.message)
            return None

    async def _drive(self, batch: BatchRecord, carried: _Carried) -> bool:
        directory = self._store.dir.work(batch.id)
        async with self._planning:
            if await asyncio.to_thread(settle, directory):
                return await self._finalize(batch)
            carried.before = batch.counts = await asyncio.to_thread(endings.count, directory)
        async with self._driving:
            endpoint = await self._find(batch)
            if endpoint is None:
                return False
            carried.step = "driving"
            driver, ended = await self._work(batch, directory, endpoint, carried)
        if ended == "complete":
            return await self._finalize(batch)
        if batch.status == "cancelling":
            return True
        if ended == "more" and driver.out_of_walltime:
            carried.step = "finishing"
            message = "the run's walltime ended before this request was answered"
            return await self._end(batch, "expired", "batch_expired", message)
        return False

    async def _work(
        self, batch: BatchRecord, directory: BatchDir, endpoint: Endpoint, carried: _Carried
    ) -> tuple[Driver, Ended]:
        me = this_process(os.environ)
        work = await asyncio.to_thread(Work, directory, me)
        carried.progress = progress = Progress(cast(TextIO, _LogLines(batch.id)))
        carried.driver = driver = Driver(work, endpoint, progress, _NO_LIMIT)
        how = "more"
        try:
            if batch.status != "in_progress":
                driver.stop("it was cancelled")
            ended = await driver.run()
            how = ended
            return driver, ended
        finally:
            batch.counts = self.counts(batch)
            carried.driver = carried.progress = None
            work.close()
            make_directory(directory.history)
            # No job of its own: the run's GPUs answer others as well.
            history.note(directory, me.name, None, progress, how, self._endpoint)

    async def _finalize(self, batch: BatchRecord) -> bool:
        if batch.status != "cancelling":
            batch.enter("finalizing")
            await self._store.save(batch)
        return True

    async def _finish(self, batch: BatchRecord, status: Status) -> bool:
        """Make the output and its files known; the batch is over then."""
        directory = self._store.dir.work(batch.id)
        try:
            outcome = await asyncio.to_thread(endings.make_output, directory)
        except Unfinished as error:
            log.warning(
                "%s: %d lines of the journals are damaged; they are done again", batch.id, error.items
            )
            batch.status = "in_progress"
            await self._store.save(batch)
            return True
        counts = Counts(
            total=outcome.completed + outcome.failed, completed=outcome.completed, failed=outcome.failed
        )
        output = errors = None
        if outcome.completed:
            output = await self._publish(batch, "output")
        if outcome.failed:
            errors = await self._publish(batch, "errors")
        batch.counts, batch.output_file_id, batch.error_file_id = counts, output, errors
        batch.enter(status)
        await self._store.save(batch)
        return True

    async def _publish(self, batch: BatchRecord, what: Literal["output", "errors"]) -> str:
        """The id of a file of this batch: the same one, however often it is made known."""
        path = self._store.dir.work(batch.id).out / f"{what}.jsonl"
        file = FileRecord(
            id=f"file-{batch.id.removeprefix('batch_')}-{what}", number=self._store.number(),
            owner=batch.owner, created_at=int(time.time()), filename=f"{batch.id}_{what}.jsonl",
            bytes=path.stat().st_size, purpose="batch_output",
            path=str(path.relative_to(self._store.dir.root)),
        )  # fmt: skip
        await self._store.save(file)
        return file.id

    async def _end(self, batch: BatchRecord, status: Status, code: str, message: str) -> bool:
        """End it before its time: what was answered comes out, and an error for each other row."""
        directory = self._store.dir.work(batch.id)
        if not directory.manifest.exists():
            batch.enter(status)
            await self._store.save(batch)
            return True
        await asyncio.to_thread(endings.give_up, directory, code, message)
        if status == "expired":
            batch.errors = [LineError(code=code, message=message)]
        return await self._finish(batch, status)

    async def _refused(self, batch: BatchRecord, message: str) -> None:
        """The endpoint takes no more of its requests, as when a key was revoked."""
        errors = [LineError(code="refused", message=message)]
        try:
            batch.errors = errors
            await self._end(batch, "failed", "refused", message)
        except HpcserveError as error:
            log.error("%s: no output: %s", batch.id, error.message)
            await self._fail(batch, errors)

    async def _fail(self, batch: BatchRecord, errors: list[LineError]) -> None:
        batch.errors = errors
        batch.enter("failed")
        try:
            await self._store.save(batch)
        except HpcserveError as error:
            # The next process finds it as it was, and comes to the same end.
            log.error("%s: %s", batch.id, error.message)


class _LogLines(io.TextIOBase):
    """A batch's progress, in the log of the process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s: %s", self._name, text.strip())
        return len(text)


def end_time(told: Mapping[str, object]) -> int | None:
    """When the run ends, as its endpoint.json says."""
    value = told.get("end_time")
    return int(value) if isinstance(value, int | float) else None
