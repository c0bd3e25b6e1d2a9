"""Hit rates to compare with: one cache for all workers: of the same size, with foresight, endless."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

from .trace import TraceRequest

_NEVER = 1 << 60


def shared(trace: Sequence[TraceRequest], blocks: int) -> float:
    """Part of all blocks that one least-recently-used cache of `blocks` for all workers has."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in trace:
        hits += _leading(request, cache)
        # As engines do it: of one prompt's blocks the last is evicted first.
        for block in reversed(request.blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits / _blocks(trace)


def foresight(trace: Sequence[TraceRequest], blocks: int) -> float:
    """The same cache, evicting what is needed again last (Belady's rule)."""
    upcoming: dict[int, int] = {}
    needed: list[list[int]] = []
    for at in range(len(trace) - 1, -1, -1):
        needed.append([upcoming.get(block, _NEVER) for block in trace[at].blocks])
        upcoming.update(dict.fromkeys(trace[at].blocks, at))
    needed.reverse()
    cache: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for request, times in zip(trace, needed, strict=True):
        hits += _leading(request, cache)
        for block, time in zip(request.blocks, times, strict=True):
            cache[block] = time
            heapq.heappush(heap, (-time, block))
        while len(cache) > blocks:
            time, block = heapq.heappop(heap)
            if cache.get(block) == -time:
                del cache[block]
    return hits / _blocks(trace)


def unlimited(trace: Sequence[TraceRequest]) -> float:
    """A cache that evicts nothing."""
    cache: set[int] = set()
    hits = 0
    for request in trace:
        hits += _leading(request, cache)
        cache.update(request.blocks)
    return hits / _blocks(trace)


def _leading(request: TraceRequest, cache: OrderedDict[int, None] | dict[int, int] | set[int]) -> int:
    for count, block in enumerate(request.blocks):
        if block not in cache:
            return count
    return len(request.blocks)


def _blocks(trace: Sequence[TraceRequest]) -> int:
    return max(sum(len(request.blocks) for request in trace), 1)
