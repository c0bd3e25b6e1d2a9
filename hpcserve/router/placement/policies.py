"""The policies by name."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from ..demand import Demand
from .choice import Choice, Policy
from .kv import LowestCost
from .pool import Pool
from .view import View

if TYPE_CHECKING:
    from ..workers import Worker

_RING_POINTS = 64
"""Places of each worker on the ring: loads within about 12 % of each other."""
_BEGINNING = 1024
"""Tokens of a prompt that consistent_hash looks at: more than most chat templates and tool lists."""
_BOUND = 1.25
"""Load over the mean at which a worker's place on the ring, or its cache, no longer counts."""


class _EachByItself:
    """A policy that chooses prefill and answering worker without regard to each other."""

    def choose(
        self, demand: Demand, answering: Sequence[Worker], prefill: Sequence[Worker], view: View
    ) -> Choice:
        pool = view.pool(answering)
        at = self.pick(demand, pool, view) if len(answering) > 1 else 0
        worker = pool.workers[at]
        if not prefill:
            return Choice(worker, None, pool.uncached(demand, view.held)[0][at])
        first = view.pool(prefill)
        place = self.pick(demand, first, view) if len(prefill) > 1 else 0
        return Choice(worker, first.workers[place], first.uncached(demand, view.held)[0][place])

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        """The place of one worker in the pool, which has several."""
        raise NotImplementedError


class RoundRobin(_EachByItself):
    """Each in turn; prefill and decode workers have turns of their own."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        role = pool.workers[0].role
        turn = self._turns[role] = self._turns.get(role, -1) + 1
        return turn % len(pool.workers)


class LeastLoad(_EachByItself):
    """Fewest seconds of prefill ahead, then fewest exchanges; equals take turns. Caches don't count."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        self._turn += 1
        return _least_loaded(pool, range(len(pool.workers)), self._turn)


class PowerOfTwo(_EachByItself):
    """The less loaded of two drawn at random."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        first, second = self._random.sample(range(len(pool.workers)), 2)
        return first if _load(pool, first) <= _load(pool, second) else second


class ConsistentHash(_EachByItself):
    """A session, or the beginning of a prompt, always goes to the same worker while that is in rotation.

    With no session and nothing to go by, the least loaded one.
    """

    def __init__(self) -> None:
        self._rings: dict[str, _Ring] = {}

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        key = demand.session or _beginning(demand)
        if not key:
            return _least_loaded(pool, range(len(pool.workers)))
        role = pool.workers[0].role
        names = pool.index.keys()
        ring = self._rings.get(role)
        if ring is None or not ring.holds(names):
            ring = self._rings[role] = _Ring(names)
        return pool.index[ring.find(key, names)]


class Prefix(_EachByItself):
    """The longest match wins, unless its worker has over 1.25 times the mean load; of equals the idlest."""

    def pick(self, demand: Demand, pool: Pool, view: View) -> int:
        uncached, _ = pool.uncached(demand, view.held)
        loads = [worker.load.in_flight for worker in pool.workers]
        most = _BOUND * (sum(loads) + 1) / len(loads)
        allowed = [at for at, load in enumerate(loads) if load <= most] or range(len(loads))
        least = min([uncached[at] for at in allowed])
        return _least_loaded(pool, [at for at in allowed if uncached[at] == least])


class _Ring:
    """Workers' names on a ring of hashes."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        points = sorted((_hash(f"{name}#{i}"), name) for name in names for i in range(_RING_POINTS))
        self._hashes = [point for point, _ in points]
        self._owners = [name for _, name in points]

    def holds(self, names: Collection[str]) -> bool:
        """All of `names` are on it; those that are not among `names` just failed and will be back."""
        return self._names.issuperset(names)

    def find(self, key: str, among: Collection[str]) -> str:
        """The first of `among` at or after the key's place."""
        start = bisect(self._hashes, _hash(key))
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner in among:
                return owner
        raise KeyError(key)


def _beginning(demand: Demand) -> str:
    """The prompt as far as it may stay the same; all of a short one."""
    if not demand.chain:
        return ""
    chunks = math.ceil(_BEGINNING / max(demand.chunk_tokens, 1.0))
    return str(demand.chain[min(chunks, len(demand.chain)) - 1])


def _hash(text: str) -> int:
    """The same in every process, unlike hash()."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def _load(pool: Pool, at: int) -> tuple[float, float]:
    return pool.reads[at][0], pool.workers[at].load.in_flight


def _least_loaded(pool: Pool, places: Collection[int], turn: int = 0) -> int:
    """Of equals the one whose `turn` it is."""
    loads = [(_load(pool, at), at) for at in places]
    least = min(loads)[0]
    equals = [at for load, at in loads if load == least]
    return equals[turn % len(equals)]


POLICIES: dict[str, Callable[[], Policy]] = {
    "kv": LowestCost,
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "power_of_two": PowerOfTwo,
    "consistent_hash": ConsistentHash,
    "prefix": Prefix,
}
"""`kv` is the default. Names are those of `router.policy` in model.yaml."""
