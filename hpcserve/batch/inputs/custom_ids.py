"""Finds custom_ids that are there twice, in 32 bytes a row.

Only 8-byte hashes of them are kept; rows whose hashes are the same are read again and compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from .extras import need

SUSPECTS = 1000
"""Hashes looked into in one pass. They come in order: the first real duplicate is found in the first pass."""


class Duplicate(NamedTuple):
    custom_id: str
    row: int
    """That of the first row whose id was there before."""
    before: int
    """The row that had it."""


class CustomIds:
    """The ids of all rows, in order."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, custom_id: str) -> None:
        self._hashes.append(self.hash(custom_id))

    @staticmethod
    def hash(custom_id: str) -> int:
        return xxhash.xxh3_64_intdigest(custom_id.encode())

    def suspects(self) -> Iterator[frozenset[int]]:
        """Hashes that more than one row has, those first whose second row comes first.

        8 bytes a row for the hashes, 8 for their order, 8 for them in this order, and less than 8 to sort.
        """
        numpy = need("numpy", "looking for duplicate custom_ids")
        hashes = numpy.frombuffer(self._hashes, dtype=numpy.uint64)
        order = numpy.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = numpy.sort(order[1:][ordered[1:] == ordered[:-1]])
        del order, ordered
        for start in range(0, len(again), SUSPECTS):
            yield frozenset(hashes[again[start : start + SUSPECTS]].tolist())


def first_duplicate(ids: Iterable[str], suspects: frozenset[int]) -> Duplicate | None:
    """The first of `ids` that was there before, among those whose hash is suspect."""
    seen: dict[str, int] = {}
    for index, custom_id in enumerate(ids):
        if CustomIds.hash(custom_id) in suspects:
            if custom_id in seen:
                return Duplicate(custom_id, index, seen[custom_id])
            seen[custom_id] = index
    return None
