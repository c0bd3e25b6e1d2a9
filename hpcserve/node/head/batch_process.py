"""The batch's driver as the head's child: started when the run is READY, and the run ends with it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ...errors import MORE_TO_DO, HpcserveError, JobError
from ...plan.plan import BatchPlan
from ...rundir.layout import RunDir
from ..console import say
from ..journal import Journal
from .child import start_child
from .ending import Ending

_POLL = 0.2
_LAST_WORDS = 20_000
"""Characters at the end of its log in which an error is looked for."""
_END = 20.0
"""Seconds in which a driver that was told to end writes down what it has."""


class BatchProcess:
    """One driver. When it has ended, so does the run."""

    def __init__(self, plan: BatchPlan, run: RunDir, journal: Journal, ending: Ending) -> None:
        self._plan = plan
        self._run = run
        self._log = run.logs / "batch.log"
        self._journal = journal
        self._ending = ending
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self.status = 0
        """The driver's exit status, and so the job's."""

    def begin(self) -> None:
        """Start it, once the endpoint is READY."""
        self._task = asyncio.create_task(self._drive())

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _drive(self) -> None:
        try:
            self._process = self._start(self._log)
        except HpcserveError as error:
            self.status = error.exit_code
            self._journal.write("warning", message=error.message, hint=error.hint)
            self._ending.finish(error.message)
            return
        self._journal.write("batch-started", pid=self._process.pid)
        told = False
        while (status := self._process.poll()) is None:
            if self._ending.forced and not told:
                told = True
                self._signal(signal.SIGTERM)
            await asyncio.sleep(_POLL)
        self.status = status if status >= 0 else 128 - status
        said = words(self.status)
        self._journal.write("batch-ended", status=self.status, message=said)
        say(said)
        self._ending.finish(said)

    async def close(self) -> None:
        """End it, if it still runs."""
        if self._task is None:
            return
        if self.busy:
            self._signal(signal.SIGTERM)
            await asyncio.wait((self._task,), timeout=_END)
        if self.busy:
            self._signal(signal.SIGKILL)
        await self._task

    def check(self) -> None:
        """Raises JobError when it ended badly, in the driver's own words and with its status."""
        if self.status in (0, MORE_TO_DO):
            return
        hint = f"`hpcserve logs {self._run.path.name}` shows its words"
        try:
            log = self._log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:]
        except OSError:
            log = ""
        _, said, text = log.rpartition("error: ")
        if not said or self.status > 128:
            raise JobError(words(self.status), hint=hint)
        message, _, advice = text.partition("\n\nhint: ")
        error = JobError(message.strip(), hint=advice.strip() or hint)
        error.exit_code = self.status
        raise error

    def _start(self, log: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "hpcserve.batch", "drive", self._plan.output,
            "--endpoint", str(self._run.endpoint), "--max-error-rate", str(self._plan.max_error_rate),
            *(["--merge-apart"] if self._plan.merge_apart else []),
        ]  # fmt: skip
        return start_child(command, log, "the batch's driver")

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


def words(status: int) -> str:
    """What a driver's exit status says."""
    if status == 0:
        return "the batch is complete"
    if status == MORE_TO_DO:
        return "there is more to do for the batch: the next job, or the same command, goes on"
    how = f"was ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
    return f"the batch's driver {how}; logs/batch.log says why"
