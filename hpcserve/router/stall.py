"""Finds workers that no longer answer and don't close their connections either: a stopped process, a cut
link. Their answers are ended with WorkerGone, so that they go on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..engines.base import Engine
from ..http.bearer import bearer
from ..http.client import Pool
from ..http.errors import UpstreamError
from .workers import Running, Worker, WorkerTable

log = logging.getLogger(__name__)

_EVERY = 0.5
QUIET = 5.0
"""Seconds without a piece after which a worker is asked whether it lives."""
_TIMES = 20.0
"""A stream that is slow by itself is given this many times its own time between two pieces."""
_HEALTH = 2.0
"""Seconds in which a worker must answer /health. Its server answers while its engine computes."""

_TRIES = 2
_DEAD = frozenset({500, 502, 503, 504})
"""What /health answers when the engine behind its server is dead: vLLM's 503, or a proxy's words for it."""


@dataclass(slots=True)
class _Seen:
    """What was last seen of one answer."""

    pieces: int
    changed: float


class StallWatch:
    """Looks at all running answers twice a second; an answer costs nothing while it comes."""

    def __init__(
        self,
        table: WorkerTable,
        pool: Pool,
        engine: Engine,
        job_key: str | None,
        suspect: Callable[[Worker, str], None],
        *,
        quiet: float = QUIET,
    ) -> None:
        self._table = table
        self._pool = pool
        self._path = engine.health_path
        self._paired = engine.paired
        self._headers = bearer(job_key)
        self._suspect = suspect
        self._quiet = quiet
        self._seen: dict[Running, _Seen] = {}
        self._asking: dict[Worker, asyncio.Task[None]] = {}
        self._alive: dict[Worker, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch from now on; called again it does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        tasks = [*self._asking.values(), *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            self._look(asyncio.get_running_loop().time())

    def _look(self, now: float) -> None:
        running: dict[Running, _Seen] = {}
        for worker in self._table.all():
            quiet = lively = False
            for lease in worker.leases:
                seen = self._seen.get(lease)
                pieces = lease.pieces
                if seen is None or pieces != seen.pieces:
                    seen = _Seen(pieces, now)
                running[lease] = seen
                between = (seen.changed - lease.since) / pieces if pieces else 0.0
                # While anything comes from it, its silence elsewhere is its own affair.
                lively = lively or (pieces > 0 and now - seen.changed < _HEALTH)
                quiet = quiet or now - seen.changed > max(self._quiet, _TIMES * between)
            if (
                quiet
                and not lively
                and worker not in self._asking
                and now - self._alive.get(worker, -_HEALTH) > _HEALTH
            ):
                task = asyncio.get_running_loop().create_task(self._ask(worker))
                self._asking[worker] = task
                task.add_done_callback(lambda _, worker=worker: self._asking.pop(worker, None))  # type: ignore[misc]
        self._seen = running
        self._alive = {worker: at for worker, at in self._alive.items() if worker.leases}

    async def _ask(self, worker: Worker) -> None:
        why = ""
        for _ in range(_TRIES):
            why = await self._dead(worker) or ""
            if not why:
                self._alive[worker] = asyncio.get_running_loop().time()
                return
        if not self._others(worker):
            # On a machine so busy that all are silent, moving the work would only add to it. The head, or
            # the supervisor, takes a dead worker out in any case.
            return
        reason = f"nothing came for {self._quiet:g} s, and {why}"
        log.warning("%s: %s", worker.name, reason)
        worker.breaker.failed(asyncio.get_running_loop().time())
        self._suspect(worker, f"{worker.name}: {reason}")
        worker.abort(reason)

    def _others(self, worker: Worker) -> bool:
        """Another one could do its work, and is not suspected itself."""
        same = self._table.with_role(worker.role)
        deputies = self._table.with_role("decode") if worker.role == "prefill" and not self._paired else []
        return any(
            other.replica != worker.replica and other not in self._asking for other in (*same, *deputies)
        )

    async def _dead(self, worker: Worker) -> str | None:
        """What is wrong with its /health; None when it lives."""
        try:
            async with asyncio.timeout(_HEALTH):
                response = await self._pool.request("GET", worker.url + self._path, headers=self._headers)
                async with response:
                    await response.read(65536)
        except TimeoutError:
            return f"{self._path} does not answer within {_HEALTH:g} s"
        except UpstreamError as error:
            return error.message
        # A server that has no such route lives as well.
        return f"{self._path} answers {response.status}" if response.status in _DEAD else None
