"""Prompt chunks that workers should hold, judged by what was sent to them.

Each worker loses the least recently used chunks beyond the size of its KV cache. A chunk is always
younger than the chunks after it, so what is left of a prompt is its beginning, as in the engine.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from ...http.compiled import compiled

UNKNOWN_CAPACITY = 500_000.0
"""Tokens, for a worker whose KV cache's size isn't known."""


class _Cache:
    """One worker's chunks, in runs: what was used together, and follows one another in a prompt.

    So a request moves a run or two, and not each of its chunks. A chunk is in one run, and where a prompt
    leaves a run, the next one it goes on with begins.
    """

    __slots__ = ("bit", "first", "names", "runs", "size")

    def __init__(self, number: int) -> None:
        self.bit = 1 << number
        self.runs: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        """By name, the one used last at the end. Of a run's chunks the first is the youngest."""
        self.first: dict[int, int] = {}
        """First chunk of each run -> the run's name."""
        self.names = 0
        """Given to runs so far."""
        self.size = 0
        """Chunks."""

    def use(self, chain: tuple[int, ...], had: int) -> None:
        """Make `chain` the youngest run, taken out of others as far as its first `had` chunks are in some."""
        name = -1
        at = 0
        while at < had:
            owner = self.first.get(chain[at], -1)
            if owner < 0:
                # Two prompts hash alike by chance: what is told of them is wrong, but nothing breaks.
                at += 1
                continue
            run = self.runs[owner]
            shared = _shared(run, chain, at)
            del self.first[run[0]]
            if shared < len(run):
                self.runs[owner] = run[shared:]
                self.first[run[shared]] = owner
            elif at == 0:
                # The prompt goes on where this one ended, or is the same.
                name = owner
            else:
                del self.runs[owner]
            at += shared
        if name < 0:
            name = self.names
            self.names += 1
        self.runs[name] = chain
        self.runs.move_to_end(name)
        self.first[chain[0]] = name


class Predicted:
    """`most` chunks in all; at that bound each worker has its equal share."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        loops = _loops()
        self._leading, self._mark, self._unmark = loops.leading, loops.mark, loops.unmark
        self._caches: dict[int, _Cache] = {}
        self._capacity: dict[int, float] = {}
        # One integer for each worker: 512 bits take 100 bytes, and most chunks lie on one worker.
        self.masks: dict[int, int] = {}
        """Chunk -> bit for each worker's number."""
        self._size = 0
        self.evicted = 0
        """Entries that the bound, not a worker's size, has cost so far."""

    def __len__(self) -> int:
        return self._size

    def capacity(self, number: int, tokens: float) -> None:
        self._capacity[number] = tokens

    def add(self, number: int, chain: tuple[int, ...], chunk_tokens: float) -> int:
        """The worker has computed or received this prompt, or will have soon.

        Returns how many of its leading chunks some worker should have held before.
        """
        cache = self._caches.get(number)
        if cache is None:
            cache = self._caches[number] = _Cache(number)
        masks, bit = self.masks, cache.bit
        seen: int = self._leading(masks, chain, -1, len(chain))
        had = self._leading(masks, chain, bit, seen)
        cache.use(chain, had)
        added = self._mark(masks, chain, had, bit)
        cache.size += added
        self._size += added
        room = max(int(self._capacity.get(number, UNKNOWN_CAPACITY) / max(chunk_tokens, 1.0)), 1)
        if cache.size > room:
            self._shrink(cache, room)
        if self._size > self._most:
            size = cache.size
            self._shrink(cache, max(self._most // len(self._caches), 1))
            self.evicted += size - cache.size
        return seen

    def forget(self, number: int) -> None:
        cache = self._caches.pop(number, None)
        self._capacity.pop(number, None)
        if cache is not None:
            self._shrink(cache, 0)

    def _shrink(self, cache: _Cache, most: int) -> None:
        masks, bit, runs = self.masks, cache.bit, cache.runs
        size = cache.size
        while size > most and runs:
            name = next(iter(runs))
            run = runs[name]
            keep = max(len(run) - (size - most), 0)
            size -= self._unmark(masks, run, keep, bit)
            if keep:
                runs[name] = run[:keep]
            else:
                del runs[name]
                if cache.first.get(run[0]) == name:
                    del cache.first[run[0]]
        self._size -= cache.size - size
        cache.size = size


def _shared(run: tuple[int, ...], chain: tuple[int, ...], at: int) -> int:
    """How many chunks of `run` are those of `chain` from `at` on; the first is."""
    if chain[at : at + len(run)] == run:
        return len(run)
    shared = 1
    most = min(len(run), len(chain) - at)
    while shared < most and run[shared] == chain[at + shared]:
        shared += 1
    return shared


def leading(masks: dict[int, int], chain: tuple[int, ...], bits: int, most: int) -> int:
    """How many of the first `most` chunks have any of `bits`."""
    if not most or not masks.get(chain[0], 0) & bits:
        return 0
    if masks.get(chain[most - 1], 0) & bits:
        return most
    low, high = 1, most - 1
    while low < high:
        middle = (low + high) // 2
        if masks.get(chain[middle], 0) & bits:
            low = middle + 1
        else:
            high = middle
    return low


def mark(masks: dict[int, int], chain: tuple[int, ...], start: int, bit: int) -> int:
    """Set `bit` for the chunks from `start` on; returns for how many it was not."""
    before, joined = len(masks), 0
    for chunk in chain[start:]:
        holders = masks.setdefault(chunk, bit)
        if holders != bit and not holders & bit:
            masks[chunk] = holders | bit
            joined += 1
    return len(masks) - before + joined


def unmark(masks: dict[int, int], chain: tuple[int, ...], start: int, bit: int) -> int:
    """Take `bit` from the chunks from `start` on; returns how many had it. A chunk without bits goes."""
    had = 0
    for chunk in chain[start:]:
        holders = masks.pop(chunk, 0)
        if holders & bit:
            had += 1
        if holders & ~bit:
            masks[chunk] = holders & ~bit
    return had


def _loops() -> Any:
    """`leading`, `mark` and `unmark`: compiled, or those above."""
    return compiled("router.kv.marks", "noting where prompts are cached") or sys.modules[__name__]


class InFlight:
    """Chunks sent a moment ago, whose events can't have come yet. An entry lives for one to two `ttl`."""

    def __init__(self, *, ttl: float) -> None:
        self._ttl = ttl
        self._mark = _loops().mark
        self._turned = 0.0
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def add(self, number: int, chain: tuple[int, ...], now: float) -> None:
        self.turn(now)
        self._mark(self._new, chain, 0, 1 << number)

    def get(self, chunk: int) -> int:
        return self._new.get(chunk, 0) | self._old.get(chunk, 0)

    def turn(self, now: float) -> None:
        """Let go of what is too old."""
        if now - self._turned >= self._ttl:
            self._old = self._new if now - self._turned < 2 * self._ttl else {}
            self._new = {}
            self._turned = now

    def forget(self, number: int) -> None:
        keep = ~(1 << number)
        for chunks in (self._new, self._old):
            for chunk, mask in list(chunks.items()):
                chunks[chunk] = mask & keep
