"""What policies know when they choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..demand import Demand
from .pool import Pool
from .popularity import Popularity
from .residency import Held

if TYPE_CHECKING:
    from ..workers import Worker

_POOLS = 8
"""Sets of workers kept: both roles, and what is left of them after failures."""


class View:
    """Kept from decision to decision; `held`, `session` and `now` are the current one's."""

    def __init__(self, *, pairs_only: bool = False) -> None:
        self.pairs_only = pairs_only
        """Decode workers compute no prompts."""
        self.held: Mapping[str, Held] = {}
        self.session: str | None = None
        """Name of the worker that last answered the request's session."""
        self.now = 0.0
        self._counted = False
        self.mean_uncached = 4096.0
        """Tokens to compute for a request, of late; each has at least one."""
        self.popularity = Popularity()
        self._pools: list[Pool] = []
        self._turn = 0

    def begin(self, now: float, held: Mapping[str, Held], session: str | None) -> None:
        """A new decision."""
        self.now = now
        self.held = held
        self.session = session
        self._counted = False

    def uses(self, demand: Demand, uncached: int) -> float:
        """How often others came of late that began as this prompt does, but for its last `uncached` tokens.

        The first question of a decision counts as one more.
        """
        cached, per_chunk = demand.prompt_tokens - uncached, demand.chunk_tokens
        chain = demand.chain
        chunks = round(cached / per_chunk) if per_chunk > 1.0 else cached
        if chunks <= 0 or not chain:
            return 0.0
        chunk = chain[chunks - 1] if chunks < len(chain) else chain[-1]
        if self._counted:
            return self.popularity.of(chunk, self.now)
        self._counted = True
        return self.popularity.used(chunk, self.now)

    def pool(self, workers: Sequence[Worker]) -> Pool:
        """Its workers in order, with loads as they are now."""
        wanted = workers if type(workers) is list else list(workers)
        for pool in self._pools:
            if pool.workers == wanted:
                break
        else:
            pool = self._new(wanted)
        self._turn += 1
        pool.turn = self._turn
        pool.refresh(self.mean_uncached, self.now)
        return pool

    def read(self, pool: Pool, at: int) -> None:
        """One worker's load as it is now."""
        pool.read(at, at + 1, self.mean_uncached, self.now)

    def _new(self, workers: list[Worker]) -> Pool:
        """Begins with what the last pool of this role knew: a worker that fails makes a new pool, not a new
        load."""
        pools, role = self._pools, workers[0].role
        last = max((p for p in pools if p.workers[0].role == role), key=lambda p: p.turn, default=None)
        pool = Pool(workers, 0.0 if last is None else last.prefilling)
        if len(pools) >= _POOLS:
            pools.remove(min(pools, key=lambda p: p.turn))
        pools.append(pool)
        return pool
