"""Not a test: the CPU time of one placement in a small pool, and of all that a request costs around it.

    python -m tests.router.placement.bench_place [--requests 20000]

Columns, µs of CPU for one request: `place() + placed()` with an index that answers at once; with the router's
own index of predicted blocks; and, with the first index, also the queues, the leases' counts and the ring of
decisions.
"""

from __future__ import annotations

import argparse
import time
from collections import deque

from hpcserve.config.model import Role
from hpcserve.router.board import SharedBoard
from hpcserve.router.config import WorkerSpec
from hpcserve.router.demand import Demand
from hpcserve.router.kv.residency import Residency
from hpcserve.router.placement.decision import Decision
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.placement.placer import Placer
from hpcserve.router.placement.residency import Residency as Held
from hpcserve.router.why.ring import Ring
from hpcserve.router.workers import Worker

from .pools import Index

CHUNKS = 16
"""A prompt of 2,000 tokens in chunks of 128."""
OPEN = 8
"""Requests that run beside each other."""
ROUNDS = 40
"""The quickest counts: what else runs on the machine only adds."""

POOLS: list[tuple[str, dict[Role, int]]] = [
    ("1 aggregated", {"aggregated": 1}),
    ("2 aggregated", {"aggregated": 2}),
    ("8 aggregated", {"aggregated": 8}),
    ("32 aggregated", {"aggregated": 32}),
    ("1 prefill + 1 decode", {"prefill": 1, "decode": 1}),
    ("1 prefill + 2 decode", {"prefill": 1, "decode": 2}),
    ("4 prefill + 4 decode", {"prefill": 4, "decode": 4}),
]


class _Call:
    """What the ring asks of a request."""

    request_id, user, model, retries, migrations = "r-1", "ada", "toy", 0, 0
    route = type("Route", (), {"path": "/v1/completions"})
    exchange = type("Exchange", (), {"status": 200})

    def __init__(self, decision: Decision) -> None:
        self.decisions = [decision]


class _Bench:
    def __init__(self, roles: dict[Role, int], processes: int) -> None:
        self.board = SharedBoard.create(processes) if processes > 1 else None
        board = None if self.board is None else SharedBoard(self.board.fd, processes=processes, process=0)
        slots = iter(range(100))
        made = {role: [_worker(role, n, next(slots), board) for n in range(c)] for role, c in roles.items()}
        self.answering = made.get("aggregated") or made["decode"]
        self.prefill = made.get("prefill", [])
        for worker in (*self.answering, *self.prefill):
            worker.load.add(3.0, 0.0, 30_000.0)

    def demands(self) -> list[Demand]:
        return [
            Demand(
                prompt_tokens=128 * CHUNKS,
                output_tokens=256,
                chain=tuple([hash((number % 8 if at < 8 else number, at)) % 2**64 for at in range(CHUNKS)]),
                chunk_tokens=128.0,
                session=f"s{number % 16}",
            )
            for number in range(64)
        ]

    def place(self, index: Held, requests: int) -> float:
        """Seconds for each `place()` and `placed()`, with a prompt waiting on one worker."""
        placer, demands = Placer("kv", index), self.demands()
        answering, prefill = self.answering, self.prefill
        waiting = (prefill or answering)[0]
        placer.prefill_began(waiting, 1500, 1.0)
        waiting.load.add(1.0, 1500.0, 2000.0)
        began = time.process_time()
        for step in range(requests):
            now = 1.0 + step * 0.001
            demand = demands[step % 64]
            decision = placer.place(demand, answering=answering, prefill=prefill, now=now)
            assert decision is not None
            placer.placed(decision, demand, now)
        taken = time.process_time() - began
        waiting.load.add(-1.0, -1500.0, -2000.0)
        return taken / requests

    def request(self, index: Held, requests: int) -> float:
        """Seconds for each request, from `place()` to the ring."""
        placer, ring, demands = Placer("kv", index), Ring(), self.demands()
        answering, prefill = self.answering, self.prefill
        calls = deque[tuple[_Call, Worker, float]]()
        began = time.process_time()
        for step in range(requests):
            now = 1.0 + step * 0.001
            demand = demands[step % 64]
            decision = placer.place(demand, answering=answering, prefill=prefill, now=now)
            assert decision is not None
            placer.placed(decision, demand, now)
            worker = decision.prefill or decision.answering
            worker.load.add(1.0, decision.uncached_tokens, 2300.0)
            placer.prefill_began(worker, decision.uncached_tokens, now)
            calls.append((_Call(decision), worker, now))
            if len(calls) > OPEN:
                call, worker, sent = calls.popleft()
                uncached = call.decisions[0].uncached_tokens
                worker.load.add(0.0, -uncached, 0.0)
                placer.prefill_ended(worker, uncached, now, seconds=now - sent)
                ring.add(call)  # type: ignore[arg-type]
                worker.load.add(-1.0, 0.0, -2300.0)
        taken = time.process_time() - began
        for call, worker, _ in calls:
            worker.load.add(-1.0, -call.decisions[0].uncached_tokens, -2300.0)
        return taken / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    for name, roles in POOLS:
        bench = _Bench(roles, args.processes)
        held = {"aggregated_0": 8, "prefill_0": 8, "decode_0": 4}
        rounds = [
            (
                bench.place(Index(**held), args.requests),
                bench.place(Residency(), args.requests),
                bench.request(Index(**held), args.requests),
            )
            for _ in range(ROUNDS)
        ]
        place, indexed, request = (1e6 * min(taken) for taken in zip(*rounds, strict=True))
        print(
            f"{name:22} {place:6.2f} µs  with the router's index {indexed:6.2f} µs"
            f"  whole request {request:6.2f} µs"
        )


def _worker(role: Role, number: int, slot: int, board: SharedBoard | None) -> Worker:
    spec = WorkerSpec(name=f"{role}-{number}", role=role, url=f"http://127.0.0.1:{number + 1}", slot=slot)
    worker = Worker(spec, board)
    worker.facts = EngineFacts(kv_tokens=1_000_000.0)
    return worker


if __name__ == "__main__":
    main()
