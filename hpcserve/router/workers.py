"""Workers: the replicas requests can go to, as the head node last announced them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from ..config.model import ROLES, Role
from .board import Board, Load
from .breaker import Breaker
from .config import WorkerSpec
from .demand import Demand
from .placement.decision import Decision
from .placement.facts import EngineFacts, Rates
from .placement.queue import Queue


class WorkerGone(Exception):
    """The worker an exchange was running on was taken out of rotation, or no longer answers."""


class Watched(Protocol):
    """What shows whether an answer still comes."""

    @property
    def pieces(self) -> int: ...


class Running(Protocol):
    """An exchange that runs on a worker."""

    since: float
    """Event loop time of the start."""

    @property
    def pieces(self) -> int:
        """Pieces of the answer that have come so far."""
        ...

    def abort(self, reason: str) -> None:
        """The worker is gone, or no longer answers."""
        ...


class Worker:
    """One generation of one replica, or of one of its data-parallel ranks. A restarted engine is a new
    Worker."""

    __slots__ = (
        "breaker", "domain", "facts", "generation", "gone", "headers", "leases", "load", "models", "name",
        "ports", "queue", "rates", "replica", "role", "slot", "url",
    )  # fmt: skip

    def __init__(self, spec: WorkerSpec, board: Board | None = None, breaker: Breaker | None = None) -> None:
        self.name = spec.name
        self.replica = spec.replica or spec.name
        """What it lives and dies with: ranks of one replica share it."""
        self.role: Role = spec.role
        self.url = spec.url.rstrip("/")
        self.ports = spec.ports
        """Its engine's ports by name, where the head knows them."""
        self.headers = tuple((name.encode(), value.encode()) for name, value in spec.headers.items())
        """What requests to it have besides their own headers."""
        self.generation = spec.generation
        self.slot = spec.slot
        """Its place on the board; None: known to this process alone."""
        self.load: Load = (board or Board()).load(spec.slot)
        """Totals over all processes; changed by leases alone."""
        self.facts: EngineFacts | None = None
        """The engine's latest metrics; None until the first came."""
        self.rates = Rates()
        self.queue = Queue(self.rates)
        """Prompts of this process that are being computed there."""
        self.domain: str | None = spec.domain
        """NVLink domain or leaf switch; None: not known."""
        self.models = spec.models
        """What it serves, as its /v1/models said; () is the endpoint's own model."""
        self.breaker = breaker or Breaker()
        """Ranks of one replica have one: where one of them fails, so do the others."""
        self.gone = False
        """It has left the table: whatever it keeps can't be reached."""
        self.leases: set[Running] = set()

    @property
    def in_flight(self) -> int:
        """Exchanges of this process."""
        return len(self.leases)

    def lease(self, demand: Demand, decision: Decision) -> Lease:
        """`async with worker.lease(demand, decision) as lease:` counts an exchange into the worker's load
        and ties it to the worker's life."""
        return Lease(self, demand, decision)

    def abort(self, reason: str) -> None:
        """End every exchange on this worker with WorkerGone."""
        for lease in list(self.leases):
            lease.abort(reason)


class Seat:
    """What one exchange takes of a worker: counted in its load from `take()` to `leave()`."""

    __slots__ = ("_giver", "_kv_tokens", "_prefill_tokens", "_running", "since", "worker")

    def __init__(self, worker: Worker, demand: Demand, decision: Decision) -> None:
        self.worker = worker
        self._running: Running | None = None
        self.since = 0.0
        """Event loop time of the start."""
        self._giver = decision.prefill if worker is not decision.prefill else None
        computes = worker is decision.prefill or decision.prefill is None
        self._prefill_tokens = float(decision.uncached_tokens) if computes else 0.0
        # A prefill worker's blocks are free again when decode has pulled them.
        answer = 0 if worker is decision.prefill else demand.output_tokens
        self._kv_tokens = float(demand.prompt_tokens + answer)

    def take(self, running: Running, now: float) -> None:
        """`running` begins, and hears of the worker's end."""
        self._running = running
        self.since = now
        worker = self.worker
        worker.leases.add(running)
        worker.load.add(1.0, self._prefill_tokens, self._kv_tokens)
        worker.breaker.asked(now)

    def first_byte(self) -> None:
        """The prompt is computed."""
        self.worker.breaker.succeeded()
        if self._giver is not None:
            self._giver.breaker.handed_over()
        if self._prefill_tokens:
            self.worker.load.add(prefill_tokens=-self._prefill_tokens)
            self._prefill_tokens = 0.0

    def leave(self) -> None:
        """It is over."""
        if self._running is not None:
            self.worker.leases.discard(self._running)
            self.worker.load.add(-1.0, -self._prefill_tokens, -self._kv_tokens)
            self._running = None


class Lease(Seat):
    """A task's exchange on a worker. Leaves with WorkerGone when the worker is taken away meanwhile."""

    __slots__ = ("_cancelling", "_reason", "_task", "_watched")

    def __init__(self, worker: Worker, demand: Demand, decision: Decision) -> None:
        super().__init__(worker, demand, decision)
        self._watched: Watched | None = None
        self._reason: str | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    async def __aenter__(self) -> Lease:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self.take(self, asyncio.get_running_loop().time())
        return self

    def watch(self, answer: Watched) -> None:
        """From now on `answer` shows whether anything comes."""
        self._watched = answer

    @property
    def pieces(self) -> int:
        """Pieces that have come so far."""
        return 0 if self._watched is None else self._watched.pieces

    def abort(self, reason: str) -> None:
        if self._reason is None and self._task is not None:
            self._reason = reason
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        # As asyncio.timeout() does: our own cancellation becomes an exception, anyone else's goes on.
        if self._reason is not None and self._task is not None:
            ours = self._task.uncancel() <= self._cancelling
            if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise WorkerGone(self._reason) from error


class WorkerTable:
    """All workers in rotation, by role."""

    def __init__(self, specs: Iterable[WorkerSpec] = (), board: Board | None = None) -> None:
        self.version = 0
        """Grows with each announcement."""
        self._board = board
        self._workers: dict[str, Worker] = {}
        self._generations: dict[str, int] = {}
        self._by_role: dict[Role, list[Worker]] = {role: [] for role in ROLES}
        self.update(specs)

    def update(self, specs: Iterable[WorkerSpec]) -> None:
        """Make this the table. Exchanges on workers that left or were restarted are aborted."""
        self.version += 1
        announced = {spec.name: spec for spec in specs}
        leaving: list[tuple[Worker, str]] = []
        for name, worker in list(self._workers.items()):
            spec = announced.get(name)
            if spec is None:
                leaving.append((worker, f"{name} was taken out of rotation"))
            elif (spec.generation, spec.url.rstrip("/"), spec.role, spec.slot) != (
                worker.generation,
                worker.url,
                worker.role,
                worker.slot,
            ):
                leaving.append((worker, f"{name} was restarted"))
        for worker, _ in leaving:
            del self._workers[worker.name]
            worker.gone = True
        for name, spec in announced.items():
            if name not in self._workers:
                worker = self._workers[name] = Worker(spec, self._board, self._breaker_of(spec))
                last = self._generations.get(name, spec.generation)
                if worker.role == "prefill" and last < spec.generation:
                    worker.breaker.probation(asyncio.get_running_loop().time())
            self._workers[name].models = spec.models
            self._workers[name].ports = spec.ports
            self._generations[name] = spec.generation
        for role in ROLES:
            self._by_role[role] = [w for w in self._workers.values() if w.role == role]
        # Last, so that what is started again sees the new table.
        for worker, reason in leaving:
            worker.abort(reason)

    def _breaker_of(self, spec: WorkerSpec) -> Breaker | None:
        """The one that other ranks of this start of its replica have."""
        for other in self._workers.values():
            if (other.replica, other.generation) == (spec.replica, spec.generation):
                return other.breaker
        return None

    def with_role(self, role: Role) -> list[Worker]:
        return self._by_role[role]

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def all(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def disaggregated(self) -> bool:
        """Prompts and answers run on different workers."""
        return bool(self._by_role["decode"] or self._by_role["prefill"]) and not self._by_role["aggregated"]

    @property
    def answering(self) -> list[Worker]:
        """The workers that write answers: aggregated ones, else decode."""
        return self._by_role["aggregated"] or self._by_role["decode"]
