"""Which worker holds a stored response: later requests name it by its id, and only that worker knows it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from ..config.model import Role
from ..http.bearer import bearer
from ..http.client import Pool
from ..http.errors import UpstreamError
from ..http.response import UpstreamResponse
from .workers import Worker

_REMEMBERED = 65_536
_ASKED_AT_ONCE = 32
_PATIENCE = 5.0


class Only:
    """One worker, where a request can go nowhere else."""

    def __init__(self, worker: Worker) -> None:
        self.answering = [worker]
        self.disaggregated = False

    def with_role(self, role: Role) -> list[Worker]:
        return [worker for worker in self.answering if worker.role == role]


class Holders:
    """One per router process. What another one placed is found by asking the workers."""

    def __init__(self, pool: Pool, job_key: str | None) -> None:
        self._pool = pool
        self._headers = bearer(job_key)
        self._workers: OrderedDict[str, Worker] = OrderedDict()

    def keep(self, response_id: str, worker: Worker) -> None:
        self._workers[response_id] = worker
        self._workers.move_to_end(response_id)
        if len(self._workers) > _REMEMBERED:
            self._workers.popitem(last=False)

    async def find(self, response_id: str, workers: Sequence[Worker]) -> Worker | None:
        """The worker that has this response; None where nobody does, or could say so."""
        known = self._workers.get(response_id)
        if known is not None and not known.gone:
            return known
        if len(workers) == 1:
            return workers[0]
        turn = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(worker: Worker) -> Worker | None:
            async with turn:
                return worker if await self._has(worker, response_id) else None

        asking = [asyncio.create_task(ask(worker)) for worker in workers]
        try:
            for answer in asyncio.as_completed(asking):
                holder = await answer
                if holder is not None:
                    self.keep(response_id, holder)
                    return holder
        finally:
            for task in asking:
                task.cancel()
        return None

    async def _has(self, worker: Worker, response_id: str) -> bool:
        response: UpstreamResponse | None = None
        try:
            async with asyncio.timeout(_PATIENCE):
                url = f"{worker.url}/v1/responses/{response_id}"
                response = await self._pool.request("GET", url, headers=self._headers)
                return response.status == 200
        except (UpstreamError, TimeoutError):
            return False
        finally:
            if response is not None:
                response.abort()
