"""The Batch API's process as the head's child: started when the run is READY, and again when it dies."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import HpcserveError
from ...plan.plan import Plan
from ...rundir.atomic import storage_error
from ...rundir.layout import RunDir
from .child import start_child
from .ending import Ending
from .registry import News

_POLL = 0.2
_BACKOFF = (0.2, 60.0)
"""Seconds before the first start again, and at most: they double."""
_STEADY = 30.0
"""Seconds after which a process has lived long enough for its next start to come soon."""
_TOLD = 0.5
"""Seconds until a signal that ended it has surely reached this process as well."""
_END = 10.0
"""Seconds in which a process that was told to end writes down what it has."""


class BatchApiProcess:
    """One process at a time. The run does without, should there be none."""

    def __init__(
        self, plan: Plan, run: RunDir, tell: Callable[[Sequence[News]], None], ending: Ending
    ) -> None:
        """`tell` takes what the run's log should have."""
        self._plan = plan
        self._run = run
        self._tell = tell
        self._ending = ending
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start it, once the endpoint is READY."""
        if importlib.util.find_spec("numpy") is None:
            self._warn(
                "this run has no Batch API: numpy is not installed",
                "install hpcserve with its extra `batch`: pip install 'hpcserve[batch]'",
            )
            return
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        delay = _BACKOFF[0]
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                self._withdraw()
                self._process = self._start(self._run.logs / "batches.log")
                while (status := self._process.poll()) is None:  # noqa: ASYNC110 - no event tells of it
                    await asyncio.sleep(_POLL)
                self._withdraw()
                if status in (0, -signal.SIGTERM):
                    # It was told to end, and perhaps so were we: `scancel` reaches all processes of the job.
                    await asyncio.sleep(_TOLD)
                if self._ending.asked.is_set():
                    return
                self._warn(
                    f"the Batch API's process ended with status {status} and is started again",
                    "batches go on where they were; logs/batches.log says why",
                )
            except HpcserveError as error:
                self._warn(error.message, error.hint)
            if loop.time() - began > _STEADY:
                delay = _BACKOFF[0]
            await asyncio.sleep(delay)
            delay = min(2 * delay, _BACKOFF[1])

    async def close(self) -> None:
        """End it, if it runs."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, _END)
        except subprocess.TimeoutExpired:
            # Every result it has heard of is in a journal, up to the last two seconds.
            process.kill()
            await asyncio.to_thread(process.wait)
        with suppress(HpcserveError):
            self._withdraw()

    def _withdraw(self) -> None:
        """Nobody is to find the one that is no more. Raises StorageError."""
        try:
            self._run.batch_api.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, "remove") from error

    def _start(self, log: Path) -> subprocess.Popen[bytes]:
        model = self._plan.model
        command = [
            sys.executable, "-m", "hpcserve.batch", "api", str(self._run.batches), "--with-parent",
            "--endpoint", str(self._run.endpoint), "--model", model.model,
        ]  # fmt: skip
        if model.revision is not None:
            command += ["--revision", model.revision]
        # Its standard input ends with this process, and so does it.
        return start_child(command, log, "the Batch API's process", stdin=subprocess.PIPE)

    def _warn(self, message: str, hint: str | None) -> None:
        self._tell([("warning", {"message": message, "hint": hint})])
