"""Who reads which piece of the model, and how far it is passed on. Pure; the same on every node.

The nodes form a ring. Each reads its part of the bytes from the shared file system, about 1/N, and
passes it to the next, which writes it down and passes it on, up to the last node that lacks it. So each
byte is read once, and each node sends and receives at most (N-1)/N of the model: the least that a
broadcast over full-duplex links can do. A file that a node already has is read there instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .source import SourceFile

CHUNK = 16 << 20
"""Bytes. Large enough that Python's part of the work is small, small enough for a ring of many nodes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    file: int
    """Index in the listing."""
    offset: int
    length: int
    owner: int
    """Place in the ring of the node that reads it."""
    hops: int
    """How many nodes get it, one after the other; 0: nobody but the owner."""

    def distance(self, place: int, size: int) -> int:
        """Hops from the owner to `place` in a ring of `size`."""
        return (place - self.owner) % size

    def comes_to(self, place: int, size: int) -> bool:
        return 0 < self.distance(place, size) <= self.hops

    def goes_on_from(self, place: int, size: int) -> bool:
        return self.distance(place, size) < self.hops


def schedule(files: Sequence[SourceFile], held: Sequence[frozenset[int]], chunk: int = CHUNK) -> list[Chunk]:
    """Chunks of all files that some node of the ring lacks. `held` has the files each place already has."""
    size = len(held)
    lacking = [[place for place in range(size) if index not in held[place]] for index, _ in enumerate(files)]
    unread = [index for index, places in enumerate(lacking) if len(places) == size]
    total = sum(files[index].size for index in unread)
    chunks: list[Chunk] = []
    position = turn = 0
    for index, file in enumerate(files):
        if not lacking[index]:
            continue
        holders = [place for place in range(size) if index in held[place]]
        for offset in range(0, file.size, chunk):
            length = min(chunk, file.size - offset)
            if holders:
                owner = holders[turn % len(holders)]
                turn += 1
            else:
                # One long stretch per node: file systems read ahead.
                owner = position * size // total
                position += length
            hops = max((place - owner) % size for place in lacking[index])
            chunks.append(Chunk(index, offset, length, owner, hops))
    return chunks
