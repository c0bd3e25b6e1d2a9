"""Workers with loads and caches as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpcserve.config.model import Role
from hpcserve.router.config import WorkerSpec
from hpcserve.router.demand import Demand
from hpcserve.router.kv.match import Match
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.workers import Worker


class Index:
    """Says what it was given, and remembers what it was told."""

    def __init__(self, **held: int | Match) -> None:
        self.held = {
            name.replace("_", "-"): match if isinstance(match, Match) else Match(match)
            for name, match in held.items()
        }
        self.predicted: list[str] = []

    def matches(self, chain: Sequence[int], *, now: float) -> Mapping[str, Match]:
        return self.held

    def predict(self, worker: str, demand: Demand, *, now: float) -> None:
        self.predicted.append(worker)


def workers(count: int, role: Role = "aggregated") -> list[Worker]:
    found = []
    for number in range(count):
        worker = Worker(WorkerSpec(name=f"{role}-{number}", role=role, url=f"http://127.0.0.1:{number + 1}"))
        worker.facts = EngineFacts(kv_tokens=1_000_000.0)
        found.append(worker)
    return found


def demand(tokens: int = 10_000, *, session: str | None = None, chunks: int = 100, key: int = 0) -> Demand:
    """`tokens` in equal chunks."""
    chain = tuple(range(key + 1, key + chunks + 1))
    return Demand(
        prompt_tokens=tokens, output_tokens=200, chain=chain, chunk_tokens=tokens / chunks, session=session
    )
