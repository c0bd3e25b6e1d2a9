"""A compact map from 64-bit hashes to small numbers, bounded: the oldest entries go.

Hashes are spread over buckets by their top bits; a bucket is three arrays, sorted by hash, searched by
bisection. That is 14 bytes an entry and what arrays keep in reserve, where a dict takes over 100. A
lookup takes about a microsecond, and so does a change; nothing is ever rehashed as a whole.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator

_BITS = 12
BUCKETS = 1 << _BITS
_SHIFT = 64 - _BITS
_AGE_STEP = 1024
"""Entries with the same age: exact order would cost 4 bytes more."""


class _Bucket:
    __slots__ = ("ages", "keys", "values")

    def __init__(self, typecode: str) -> None:
        self.keys = array("Q")
        self.values = array(typecode)
        self.ages = array("I")


class Table:
    """`typecode` is that of the values: `H` for 16 bits, `Q` for 64. `on_evicted` hears of keys that went."""

    def __init__(self, typecode: str, *, most: int, on_evicted: Callable[[int], None] | None = None) -> None:
        self._typecode = typecode
        self._buckets: list[_Bucket | None] = [None] * BUCKETS
        self._fullest = max(8, most // BUCKETS)
        self._on_evicted = on_evicted
        self._puts = 0
        self.evicted = 0
        """Entries that the bound has cost so far."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def get(self, key: int) -> int | None:
        bucket = self._buckets[key >> _SHIFT]
        if bucket is None:
            return None
        keys = bucket.keys
        at = bisect_left(keys, key)
        return bucket.values[at] if at < len(keys) and keys[at] == key else None

    def put(self, key: int, value: int) -> None:
        """Set it, and make it the youngest."""
        number = key >> _SHIFT
        bucket = self._buckets[number]
        if bucket is None:
            bucket = self._buckets[number] = _Bucket(self._typecode)
        self._puts += 1
        age = self._puts // _AGE_STEP
        keys = bucket.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            bucket.values[at] = value
            bucket.ages[at] = age
            return
        if len(keys) >= self._fullest:
            self._evict(bucket)
            at = bisect_left(keys, key)
        keys.insert(at, key)
        bucket.values.insert(at, value)
        bucket.ages.insert(at, age)
        self._size += 1

    def remove(self, key: int) -> None:
        """Nothing happens when it isn't there."""
        bucket = self._buckets[key >> _SHIFT]
        if bucket is None:
            return
        keys = bucket.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            del keys[at], bucket.values[at], bucket.ages[at]
            self._size -= 1

    def entries(self, bucket: int) -> Iterator[tuple[int, int]]:
        """Key and value of all entries in one of the BUCKETS; it may be changed meanwhile."""
        found = self._buckets[bucket]
        if found is not None:
            yield from list(zip(found.keys, found.values, strict=True))

    def _evict(self, bucket: _Bucket) -> None:
        at = bucket.ages.index(min(bucket.ages))
        key = bucket.keys[at]
        del bucket.keys[at], bucket.values[at], bucket.ages[at]
        self._size -= 1
        self.evicted += 1
        if self._on_evicted is not None:
            self._on_evicted(key)
