"""A prefix cache in a few lines, which announces its blocks as an engine would."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hpcserve.engines.kv_events.format import GPU, AllBlocksCleared, BlockRemoved, BlockStored, Event

BlockKey = tuple[str | None, tuple[int, ...]]


class Cache:
    """Blocks of any size; a block's key is the prefix it ends."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._names: dict[BlockKey, int] = {}
        self.stored: dict[int, set[BlockKey]] = {}
        """Blocks in each tier."""

    def name(self, tokens: Sequence[int], lora: str | None = None) -> int:
        return self._names.setdefault((lora, tuple(tokens)), len(self._names) + 1)

    def blocks(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The prefixes that end with each whole block."""
        ends = range(self.block_size, len(tokens) + 1, self.block_size)
        return [tuple(tokens[:end]) for end in ends]

    def store(
        self, tokens: Sequence[int], *, splits: Sequence[int] = (), lora: str | None = None, tier: int = GPU
    ) -> list[Event]:
        """All of a prompt's blocks, in one event or cut at `splits` (numbers of blocks)."""
        prefixes = self.blocks(tokens)
        cuts = sorted({0, *(cut for cut in splits if cut < len(prefixes)), len(prefixes)})
        events: list[Event] = []
        for start, end in pairwise(cuts):
            part = prefixes[start:end]
            events.append(
                BlockStored(
                    hashes=[self.name(prefix, lora) for prefix in part],
                    parent=self.name(prefixes[start - 1], lora) if start else None,
                    tokens=list(tokens[start * self.block_size : end * self.block_size]),
                    block_size=self.block_size,
                    tier=tier,
                    lora=lora,
                )
            )
            self.stored.setdefault(tier, set()).update((lora, prefix) for prefix in part)
        return events

    def remove(self, prefix: Sequence[int], *, lora: str | None = None, tier: int | None = None) -> Event:
        for number, held in self.stored.items():
            if tier in (None, number):
                held.discard((lora, tuple(prefix)))
        return BlockRemoved(hashes=[self.name(prefix, lora)], tier=tier)

    def clear(self) -> Event:
        self.stored.clear()
        return AllBlocksCleared()

    def reusable(self, tokens: Sequence[int], lora: str | None = None) -> int:
        """Leading tokens of a prompt that are cached in any tier."""
        count = 0
        for prefix in self.blocks(tokens):
            if not any((lora, prefix) in held for held in self.stored.values()):
                break
            count = len(prefix)
        return count
