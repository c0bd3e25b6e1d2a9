"""Other routers' published formulas, written again from their documentation to be simulated beside ours.

These are not the peers' programs: what a formula says about placement is here, what a program does beyond
it is not. They are told of caches by the same events, with the same delay, as our own policies.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence

from .engine import Job
from .simulate import Setup
from .trace import TraceRequest


class Watcher:
    """What every peer keeps: caches as events tell of them, and what it has in flight."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.cached: list[set[int]] = [set() for _ in range(setup.workers)]
        self.in_flight = [0] * setup.workers
        self.waiting = [0] * setup.workers
        """Requests without a first token."""
        self.prefill_blocks = [0] * setup.workers
        """Blocks to compute of those, as believed when they were placed."""
        self.held_blocks = [0] * setup.workers
        """Prompt blocks of all in flight."""
        self._expected: dict[int, int] = {}
        self.random = random.Random(1)

    def route(self, request: TraceRequest, now: float) -> int:
        overlaps = [self.overlap(number, request) for number in range(self.setup.workers)]
        number = self.choose(request, overlaps)
        self.in_flight[number] += 1
        self.waiting[number] += 1
        fresh = len(request.blocks) - overlaps[number]
        self._expected[id(request)] = fresh
        self.prefill_blocks[number] += fresh
        self.held_blocks[number] += len(request.blocks)
        return number

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        raise NotImplementedError

    def overlap(self, number: int, request: TraceRequest) -> int:
        """Leading blocks of the request in the cache of an engine."""
        cached = self.cached[number]
        for count, block in enumerate(request.blocks):
            if block not in cached:
                return count
        return len(request.blocks)

    def first_token(self, job: Job, now: float) -> None:
        self.waiting[job.worker] -= 1
        self.prefill_blocks[job.worker] -= self._expected.pop(id(job.request))

    def finished(self, job: Job, now: float) -> None:
        self.in_flight[job.worker] -= 1
        self.held_blocks[job.worker] -= len(job.request.blocks)

    def cache_changed(self, worker: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        self.cached[worker].update(stored)
        self.cached[worker].difference_update(removed)

    def lowest(self, costs: Sequence[float]) -> int:
        """The place of the smallest number; equals are drawn from."""
        least = min(costs)
        return self.random.choice([i for i, cost in enumerate(costs) if cost == least])


class DynamoCost(Watcher):
    """Dynamo 1.x, mode kv, linear: `prefill_load_scale * adjusted prefill blocks + decode blocks`, defaults.

    Source: ai-dynamo/dynamo, docs/components/router/router-concepts.md.
    """

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        size = len(request.blocks)
        return self.lowest(
            [
                max(self.prefill_blocks[i] + size - overlaps[i], 0) + self.held_blocks[i] + size
                for i in range(self.setup.workers)
            ]
        )


class DynamoPrefillCost(Watcher):
    """The same as its prefill router uses it: active blocks aren't tracked, only prefill counts."""

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        size = len(request.blocks)
        return self.lowest(
            [max(self.prefill_blocks[i] + size - overlaps[i], 0) for i in range(self.setup.workers)]
        )


class CacheAware(Watcher):
    """cache_aware of SGLang's gateway and vllm-router: a match over 0.5 wins while loads are balanced.

    Balanced: within 32 requests or a factor of 1.1. It believes in a tree of what it routed, not in
    events. Source: lightseekorg/smg, model_gateway/src/policies; vllm-project/router,
    docs/load_balancing/README.md.
    """

    _TREE = 10_000
    """Nodes the tree is cut back to, here blocks for each engine."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._trees: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(setup.workers)]

    def overlap(self, number: int, request: TraceRequest) -> int:
        tree = self._trees[number]
        for count, block in enumerate(request.blocks):
            if block not in tree:
                return count
        return len(request.blocks)

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        most, least = max(self.in_flight), min(self.in_flight)
        best = max(overlaps)
        if (most - least > 32 and most > 1.1 * least) or best <= 0.5 * len(request.blocks):
            number = self.lowest(self.in_flight)
        else:
            number = self.lowest([-overlap for overlap in overlaps])
        tree = self._trees[number]
        for block in reversed(request.blocks):
            tree[block] = None
            tree.move_to_end(block)
        while len(tree) > self._TREE:
            tree.popitem(last=False)
        return number


class LlmdScorer(Watcher):
    """llm-d's precise prefix cache profile: prefix 2, KV use 1, queue 1; the highest score wins.

    Source: llm-d/llm-d-router, deploy/config/epp-precise-prefix-cache-config.yaml.
    """

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        most, least = max(self.waiting), min(self.waiting)
        size = max(len(request.blocks), 1)
        capacity = self.setup.engine.blocks

        def score(i: int) -> float:
            queue = (most - self.waiting[i]) / (most - least) if most > least else 1.0
            usage = min(self.held_blocks[i] / capacity, 1.0)
            return 2.0 * overlaps[i] / size + (1.0 - usage) + queue

        return self.lowest([-score(i) for i in range(self.setup.workers)])


class LongestPrefix(Watcher):
    """The trap: the longest match wins, whatever the load; what production-stack's prefixaware comes to."""

    def choose(self, request: TraceRequest, overlaps: list[int]) -> int:
        return self.lowest([-overlap for overlap in overlaps])


PEERS: dict[str, Callable[[Setup], Watcher]] = {
    "dynamo (formula)": DynamoCost,
    "dynamo prefill (formula)": DynamoPrefillCost,
    "cache_aware (formula)": CacheAware,
    "llm-d (formula)": LlmdScorer,
    "longest prefix": LongestPrefix,
}
