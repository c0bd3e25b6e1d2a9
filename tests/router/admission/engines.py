"""Engines and clients of a few lines, in virtual time, around a real Admission."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hpcserve.http.errors import HttpError
from hpcserve.router.admission.admission import Admission
from hpcserve.router.board import Board, SharedBoard
from hpcserve.router.config import RouterConfig, WorkerSpec
from hpcserve.router.demand import Demand
from hpcserve.router.keys.identity import Identity
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.workers import WorkerTable


class Engine:
    """Computes prompts one after the other, then writes up to `slots` answers side by side."""

    def __init__(self, *, prefill: float, decode: float = 50.0, slots: int = 10_000) -> None:
        self.prefill = prefill
        self.decode = decode
        self._slots = asyncio.Semaphore(slots)
        self._prompts = asyncio.Lock()
        self.held = 0

    async def answer(self, prompt: int, output: int, first_byte: Callable[[], None]) -> None:
        self.held += 1
        try:
            async with self._slots:
                async with self._prompts:
                    await asyncio.sleep(prompt / self.prefill)
                first_byte()
                await asyncio.sleep(output / self.decode)
        finally:
            self.held -= 1


@dataclass(slots=True)
class Seen:
    """How one request ended."""

    at: float
    ttft: float | None = None
    refused_after: float | None = None
    retry_after: int = 0
    reason: str = ""


@dataclass(slots=True)
class Client:
    """Requests of one key, and how they ended."""

    identity: Identity
    seen: list[Seen] = field(default_factory=list)

    def accepted(self, start: float = 0.0, end: float = 1e9) -> list[Seen]:
        return [one for one in self.seen if one.ttft is not None and start <= one.at < end]

    def refused(self, start: float = 0.0, end: float = 1e9) -> list[Seen]:
        return [one for one in self.seen if one.refused_after is not None and start <= one.at < end]


class World:
    """Workers, a router's admission in each of its processes, and clients."""

    def __init__(
        self,
        *engines: Engine,
        queue_seconds: float = 2.0,
        declared: float | None = None,
        kv_tokens: float | None = None,
        processes: int = 1,
    ) -> None:
        self.engines = engines
        specs = [
            WorkerSpec(name=f"aggregated-{number}", role="aggregated", url="http://none")
            for number in range(len(engines))
        ]
        self.table = WorkerTable(specs)
        for worker in self.table.all():
            if declared is not None:
                worker.rates.observe("prefill", declared, 1.0)
            if kv_tokens is not None:
                worker.facts = EngineFacts(kv_tokens=kv_tokens)
        config = RouterConfig(
            served_name="toy", engine="fake", queue_seconds=queue_seconds, processes=processes
        )
        boards = [Board()] if processes == 1 else _shared(processes)
        self.admissions = [Admission(config, board, table=self.table) for board in boards]
        self.admission = self.admissions[0]
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(
        self,
        client: Client,
        prompt: int,
        output: int,
        *,
        priority: int = 0,
        streams: bool = True,
        process: int = 0,
    ) -> None:
        """One request, to its end, which came to that process."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        seen = Seen(began)
        client.seen.append(seen)
        demand = Demand(prompt_tokens=prompt, output_tokens=output, priority=priority, model="toy")
        try:
            admission = self.admissions[process]
            async with admission.admit(client.identity, demand, streams=streams) as ticket:
                self._next = (self._next + 1) % len(self.engines)

                def first_byte() -> None:
                    seen.ttft = loop.time() - began
                    if streams:
                        ticket.first_byte()

                await self.engines[self._next].answer(prompt, output, first_byte)
                ticket.used(prompt_tokens=prompt, cached_tokens=0, completion_tokens=output)
        except HttpError as error:
            headers = dict(error.headers)
            seen.refused_after = loop.time() - began
            seen.retry_after = int(headers[b"retry-after"])
            seen.reason = headers[b"x-hpcserve-reason"].decode()

    async def offer(
        self,
        client: Client,
        *,
        rate: float,
        seconds: float,
        prompt: int = 1000,
        output: int = 100,
        priority: int = 0,
        seed: int = 0,
        process: int = 0,
    ) -> None:
        """Poisson arrivals, whatever becomes of them; returns when the last one has come."""
        dice = random.Random(seed)
        loop = asyncio.get_running_loop()
        at = loop.time()
        end = at + seconds
        while True:
            at += dice.expovariate(rate)
            if at >= end:
                await asyncio.sleep(max(0.0, end - loop.time()))
                return
            await asyncio.sleep(at - loop.time())
            task = asyncio.create_task(self.ask(client, prompt, output, priority=priority, process=process))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def over(self) -> None:
        """All requests have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def empty(self) -> bool:
        """Nothing is held, nothing waits."""
        return all(
            admission.prefill.total == 0.0
            and admission.kv.total == 0.0
            and admission.queue.waiting == 0
            and admission.queue.backlog == 0.0
            for admission in self.admissions
        )


def _shared(processes: int) -> list[Board]:
    first = SharedBoard.create(processes)
    try:
        return [
            SharedBoard(os.dup(first.fd), processes=processes, process=number) for number in range(processes)
        ]
    finally:
        first.close()


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]
