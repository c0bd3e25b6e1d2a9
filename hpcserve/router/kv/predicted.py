"""Prompt chunks that workers should hold, judged by what was sent to them.

Each worker loses the least recently used chunks beyond the size of its KV cache. A chunk is always
younger than the chunks after it, so what is left of a prompt is its beginning, as in the engine.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from ...http.compiled import compiled

UNKNOWN_CAPACITY = 500_000.0
"""Tokens, for a worker whose KV cache's size isn't known."""


class _Cache:
    """One worker's chunks, in runs: what was used together, and follows one another in a prompt.

    So a request moves a run or two, and not each of its chunks. A chunk is in one run, and where a prompt
    leaves a run, the next one it goes on with begins.
    """

    __slots__ = ("_shared", "first", "names", "number", "runs", "size")

    def __init__(self, number: int, shared: Callable[[Sequence[int], Sequence[int], int], int]) -> None:
        self._shared = shared
        self.number = number
        self.runs: OrderedDict[int, Sequence[int]] = OrderedDict()
        """By name, the one used last at the end. Of a run's chunks the first is the youngest."""
        self.first: dict[int, int] = {}
        """First chunk of each run -> the run's name."""
        self.names = 0
        """Given to runs so far."""
        self.size = 0
        """Chunks."""

    def use(self, chain: Sequence[int], had: int) -> None:
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
            shared = self._shared(run, chain, at)
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
        way = _way()
        self._shared = way.shared
        self._marks = way.Marks()
        self.items = self._marks.items
        self.get: Callable[[int, int], int] = self._marks.get
        """A chunk's bits, one for each worker's number that should hold it; or what is given for none."""
        self._caches: dict[int, _Cache] = {}
        self._capacity: dict[int, float] = {}
        self._size = 0
        self.evicted = 0
        """Entries that the bound, not a worker's size, has cost so far."""

    def __len__(self) -> int:
        return self._size

    def capacity(self, number: int, tokens: float) -> None:
        self._capacity[number] = tokens

    def add(self, number: int, chain: Sequence[int], chunk_tokens: float) -> int:
        """The worker has computed or received this prompt, or will have soon.

        Returns how many of its leading chunks some worker should have held before.
        """
        cache = self._caches.get(number)
        if cache is None:
            cache = self._caches[number] = _Cache(number, self._shared)
        marks = self._marks
        seen: int = marks.leading(chain, None, len(chain))
        had = marks.leading(chain, number, seen)
        cache.use(chain, had)
        added = marks.mark(chain, had, number)
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
        marks, runs = self._marks, cache.runs
        size = cache.size
        while size > most and runs:
            name = next(iter(runs))
            run = runs[name]
            keep = max(len(run) - (size - most), 0)
            size -= marks.unmark(run, keep, cache.number)
            if keep:
                runs[name] = run[:keep]
            else:
                del runs[name]
                if cache.first.get(run[0]) == name:
                    del cache.first[run[0]]
        self._size -= cache.size - size
        cache.size = size


class Marks:
    """Chunk -> which workers it is marked for, by number."""

    def __init__(self) -> None:
        # One integer for each chunk: 512 bits take 100 bytes, and most chunks lie on one worker.
        self._masks: dict[int, int] = {}
        self.items = self._masks.items
        self.get = self._masks.get
        """The mask of a chunk: a bit for each worker's number."""

    def __len__(self) -> int:
        return len(self._masks)

    def leading(self, chain: Sequence[int], number: int | None, most: int) -> int:
        """How many of the first `most` chunks are marked for worker `number`; None: for any."""
        masks, bits = self._masks, -1 if number is None else 1 << number
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

    def mark(self, chain: Sequence[int], start: int, number: int) -> int:
        """Mark the chunks from `start` on; returns how many were not."""
        masks, bit = self._masks, 1 << number
        added = 0
        for chunk in chain[start:]:
            before = masks.get(chunk, 0)
            if not before & bit:
                masks[chunk] = before | bit
                added += 1
        return added

    def unmark(self, chain: Sequence[int], start: int, number: int) -> int:
        """Take the mark from the chunks from `start` on; returns how many had it."""
        masks, bit = self._masks, 1 << number
        had = 0
        for chunk in chain[start:]:
            before = masks.get(chunk, 0)
            if before & bit:
                had += 1
                if before == bit:
                    del masks[chunk]
                else:
                    masks[chunk] = before & ~bit
        return had


def shared(run: Sequence[int], chain: Sequence[int], start: int) -> int:
    """How many chunks at the beginning of `run` are those of `chain` from `start` on."""
    if chain[start : start + len(run)] == run:
        return len(run)
    count = 0
    most = min(len(run), len(chain) - start)
    while count < most and run[count] == chain[start + count]:
        count += 1
    return count


def _way() -> Any:
    """`Marks` and `shared`: compiled, or those above."""
    return compiled("router.kv.marks", "noting where prompts are cached") or sys.modules[__name__]


class InFlight:
    """Chunks sent a moment ago, whose events can't have come yet. An entry lives for one to two `ttl`."""

    def __init__(self, *, ttl: float) -> None:
        self._ttl = ttl
        self._made = _way().Marks
        self._turned = 0.0
        self._new, self._old = self._made(), self._made()

    def add(self, number: int, chain: Sequence[int], now: float) -> None:
        self.turn(now)
        self._new.mark(chain, 0, number)

    def get(self, chunk: int) -> int:
        found: int = self._new.get(chunk, 0) | self._old.get(chunk, 0)
        return found

    def turn(self, now: float) -> None:
        """Let go of what is too old."""
        if now - self._turned >= self._ttl:
            self._old = self._new if now - self._turned < 2 * self._ttl else self._made()
            self._new = self._made()
            self._turned = now

    def forget(self, number: int) -> None:
        for marks in (self._new, self._old):
            marks.unmark([chunk for chunk, _ in marks.items()], 0, number)
