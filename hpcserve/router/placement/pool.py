"""One role's workers as a decision sees them: loads read once, costs as a line in uncached tokens.

The cost of a worker is `base + tokens * slope`, so that hundreds of workers are compared in few operations.
Reading a load means summing over all router processes; with many workers only a part is read again for each
decision, and whoever is about to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING

from ..demand import Demand
from .cost import BARRIER, FULLEST, PER_STREAM, wait
from .cost import behind as behind_at
from .residency import Held

if TYPE_CHECKING:
    from ..workers import Worker

_ALL_AT_ONCE = 32
"""Workers whose load is read for each decision; the others are read in turn."""
MEMORY = 60.0
"""Seconds over which the share of time that workers prefill is averaged."""


Read = tuple[float, float, float, float, float]
"""One worker's load: seconds of prefill ahead, streams, usage of its KV memory, seconds of cost that don't
depend on the request, seconds of cost for each uncached token. A tuple, as each decision makes some."""


class Pool:
    """Workers of one role. Rebuilt when they change."""

    def __init__(self, workers: Sequence[Worker], prefilling: float = 0.0) -> None:
        self.workers = list(workers)
        self.index = {worker.name: at for at, worker in enumerate(self.workers)}
        size = len(self.workers)
        self.partly_read = size > _ALL_AT_ONCE
        """Some loads may be a few decisions old."""
        by_domain: dict[str | None, list[int]] = {}
        for at, worker in enumerate(self.workers):
            by_domain.setdefault(worker.domain, []).append(at)
        self.domains = list(by_domain.values())
        """Places of the workers of each."""
        self.reads: list[Read] = [(0.0, 0.0, 0.0, 0.0, 0.0)] * size
        """As each was read last."""
        self.prefilling = prefilling
        """Share of time that workers had prompts to compute, of late."""
        self.behind = behind_at(prefilling)
        self.turn = 0
        """The last decision it was used for, in the view's count."""
        self._seen = 0.0
        self._busy = 0.0
        self._next = -1
        """Where reading goes on; -1 before the first."""

    def refresh(self, mean_uncached: float, now: float) -> None:
        """Read loads: of all where they are few, else of the next part."""
        start, stop = 0, len(self.workers)
        if self.partly_read:
            if self._next >= 0:
                start, stop = self._next, min(self._next + _ALL_AT_ONCE, stop)
            self._next = stop % len(self.workers)
        busy = self.read(start, stop, mean_uncached, now) / (stop - start)
        # By time, not by decision: bursts would count what they bring themselves.
        if now > self._seen > 0.0:
            weight = 1.0 - exp((self._seen - now) / MEMORY)
            self.prefilling += weight * ((busy + self._busy) / 2 - self.prefilling)
            self.behind = behind_at(self.prefilling)
        self._seen = now
        self._busy = busy

    def read(self, start: int, stop: int, mean_uncached: float, now: float) -> int:
        """Read the loads of some workers again; returns how many of them have prompts to compute."""
        workers, reads, behind = self.workers, self.reads, self.behind
        busy = 0
        for at in range(start, stop):
            worker = workers[at]
            streams, queued, kv_tokens = worker.load.read()
            rate = worker.rates.prefill
            waits = 0.0
            if queued > 0.0:
                busy += 1
                queue = worker.queue
                waits = wait(queued, queue.head, now - queue.since, rate)
                streams -= queued / mean_uncached
                if streams < 0.0:
                    streams = 0.0
            facts = worker.facts
            usage = 0.0
            if facts is not None:
                usage = kv_tokens / facts.kv_tokens if facts.kv_tokens else facts.kv_usage
            # As cost.barrier() and cost.prefill_factor(), without the time of a call for each worker.
            fixed = waits
            if usage > 0.0:
                used = usage if usage < FULLEST else FULLEST
                fixed += BARRIER * used / (1.0 - used)
            reads[at] = waits, streams, usage, fixed, (behind + PER_STREAM * streams) / rate
        return busy

    def uncached(self, demand: Demand, held: Mapping[str, Held]) -> tuple[list[int], dict[int, Held]]:
        """Tokens of the prompt each worker would have to compute, at least one; and, by place, what workers
        hold that have part of it in slower memory."""
        total, per_chunk, index = demand.prompt_tokens, demand.chunk_tokens, self.index
        if total < 1:
            total = 1
        found = [total] * len(self.workers)
        slower: dict[int, Held] = {}
        last: Held | None = None
        left = beyond = 0
        for name, match in held.items():
            at = index.get(name)
            if at is None:
                continue
            if match is not last:
                # Workers that hold the same share one match.
                last, beyond = match, match.cpu + match.storage
                left = total - int((match.gpu + beyond) * per_chunk)
                if left < 1:
                    left = 1
            if beyond:
                slower[at] = match
            found[at] = left
        return found, slower
