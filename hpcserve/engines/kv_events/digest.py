"""From an engine's block events to the token units that a request can really reuse.

A block counts only while all blocks before it are there, too, so what is published is always closed: a
unit is never without the units before it. Units are those of `units.py`, whatever the block size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xxhash import xxh3_64_intdigest

from . import units
from .format import TIERS, AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash

_NOWHERE = len(TIERS)


class _Block:
    """A block in the tree. `tail` and `state` are what the hashes of later units start from."""

    __slots__ = ("children", "key", "parent", "reach", "state", "tail", "tiers", "units")

    def __init__(self, key: Hash | None, parent: _Block | None) -> None:
        self.key = key
        self.parent = parent
        self.children: dict[_Block, None] = {}
        self.units: tuple[int, ...] = ()
        """Units that end in this block."""
        self.state = 0
        self.tail = b""
        """Tokens after the last whole unit."""
        self.tiers = 0
        """Bit for each tier that has it."""
        self.reach = _NOWHERE
        """The slowest tier that a request must read from to get this far."""


class Changes:
    """What a digest publishes: apply `cleared`, then `dropped`, then `stored`."""

    __slots__ = ("cleared", "dropped", "stored")

    def __init__(self, cleared: bool, dropped: list[int], stored: dict[int, list[int]]) -> None:
        self.cleared = cleared
        self.dropped = dropped
        self.stored = stored
        """Tier -> units."""

    def __bool__(self) -> bool:
        return self.cleared or bool(self.dropped) or bool(self.stored)


class Digest:
    """One engine's cache, or several ranks' of one engine together.

    `most` blocks are kept; beyond, the oldest without children go, as if they were removed.
    """

    def __init__(self, *, most: int = 4_000_000) -> None:
        self._most = most
        self._blocks: dict[tuple[int, Hash], _Block] = {}
        self._held: dict[int, list[int]] = {}
        """Unit -> number of blocks that complete it, by tier."""
        self._told: dict[int, int] = {}
        """Unit -> tier, as last published."""
        self._touched: dict[int, None] = {}
        self._cleared = False
        self.unknown = 0
        """Events about blocks whose beginning was never announced."""

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, events: Iterable[Event], rank: int = 0) -> None:
        """Take events of one data-parallel rank in their order."""
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event, rank)
            elif isinstance(event, BlockRemoved):
                self._remove(event, rank)
            elif isinstance(event, AllBlocksCleared):
                self.clear(rank)

    def clear(self, rank: int = 0) -> None:
        """Nothing of this rank's cache is left, or nothing is known about it any more."""
        mine = [key for key in self._blocks if key[0] == rank]
        if len(mine) == len(self._blocks):
            self._blocks.clear()
            self._held.clear()
            self._touched.clear()
            self._cleared = self._cleared or bool(self._told)
            self._told.clear()
            return
        for key in mine:
            block = self._blocks.pop(key)
            self._count(block, block.reach, -1)

    def changes(self) -> Changes:
        """What is new since the last call."""
        dropped: list[int] = []
        stored: dict[int, list[int]] = {}
        for unit in self._touched:
            tier = self._tier(unit)
            if tier == self._told.get(unit, _NOWHERE):
                continue
            if tier == _NOWHERE:
                del self._told[unit]
                dropped.append(unit)
            else:
                self._told[unit] = tier
                stored.setdefault(tier, []).append(unit)
        self._touched.clear()
        cleared, self._cleared = self._cleared, False
        return Changes(cleared, dropped, stored)

    def snapshot(self) -> Changes:
        """Everything; also counts as published."""
        self.changes()
        stored: dict[int, list[int]] = {}
        for unit, tier in self._told.items():
            stored.setdefault(tier, []).append(unit)
        return Changes(True, [], stored)

    def _store(self, event: BlockStored, rank: int) -> None:
        if not event.tokens:
            self._move(event, rank)
            return
        parent = None if event.parent is None else self._blocks.get((rank, event.parent))
        if event.parent is not None and parent is None:
            # Its tokens don't tell the prefix they follow, and it can't be reached through the unknown.
            self.unknown += 1
            return
        state = parent.state if parent else _root(event)
        tail = parent.tail if parent else b""
        try:
            data = units.token_bytes(event.tokens)
        except (OverflowError, TypeError):
            self.unknown += 1
            return
        step = event.block_size * 4
        for number, key in enumerate(event.hashes):
            block = self._blocks.get((rank, key))
            if block is None:
                extra = event.extra[number] if number < len(event.extra) else None
                if parent is not None or not _is_salt(extra, event):
                    state = _mixed(state, extra, event.lora)
                tokens = tail + data[number * step : (number + 1) * step]
                block = self._insert((rank, key), parent, tokens, state)
            block.tiers |= 1 << event.tier
            self._settle(block)
            parent, state, tail = block, block.state, block.tail
        self._bound()

    def _insert(self, key: tuple[int, Hash], parent: _Block | None, tokens: bytes, state: int) -> _Block:
        block = self._blocks[key] = _Block(key[1], parent)
        found = units.units_of(tokens, state)
        block.units = tuple(found)
        block.state = found[-1] if found else state
        block.tail = tokens[len(found) * units.UNIT_BYTES :]
        if parent is not None:
            parent.children[block] = None
        return block

    def _move(self, event: BlockStored, rank: int) -> None:
        """Blocks without tokens: ones known already, now in another tier as well."""
        for key in event.hashes:
            block = self._blocks.get((rank, key))
            if block is None:
                self.unknown += 1
            else:
                block.tiers |= 1 << event.tier
                self._settle(block)

    def _remove(self, event: BlockRemoved, rank: int) -> None:
        for key in event.hashes:
            block = self._blocks.get((rank, key))
            if block is None:
                continue
            block.tiers = 0 if event.tier is None else block.tiers & ~(1 << event.tier)
            self._settle(block)
            self._prune(block, rank)

    def _prune(self, block: _Block | None, rank: int) -> None:
        """A block that is gone is kept only while others need it to be found again."""
        while block is not None and block.key is not None and not block.tiers and not block.children:
            del self._blocks[(rank, block.key)]
            parent = block.parent
            if parent is not None:
                del parent.children[block]
            block = parent

    def _settle(self, block: _Block) -> None:
        """Work out again how far the cache reaches from this block on."""
        waiting = [block]
        while waiting:
            block = waiting.pop()
            before = 0 if block.parent is None else block.parent.reach
            own = _fastest(block.tiers)
            reach = max(before, own)
            if reach == block.reach:
                continue
            self._count(block, block.reach, -1)
            block.reach = reach
            self._count(block, reach, +1)
            waiting += block.children

    def _count(self, block: _Block, tier: int, amount: int) -> None:
        if tier == _NOWHERE:
            return
        for unit in block.units:
            counts = self._held.get(unit)
            if counts is None:
                counts = self._held[unit] = [0] * len(TIERS)
            counts[tier] += amount
            if amount < 0 and not any(counts):
                del self._held[unit]
            self._touched[unit] = None

    def _tier(self, unit: int) -> int:
        counts = self._held.get(unit)
        if counts is not None:
            for tier, count in enumerate(counts):
                if count:
                    return tier
        return _NOWHERE

    def _bound(self) -> None:
        """Rare: an engine with more blocks than `most`, or one that forgets to say what it removed."""
        while len(self._blocks) > self._most:
            leaves = [(rank, block) for (rank, _), block in self._blocks.items() if not block.children]
            for rank, block in leaves[: max(self._most // 100, len(self._blocks) - self._most)]:
                block.tiers = 0
                self._settle(block)
                self._prune(block, rank)


def _root(event: BlockStored) -> int:
    first = event.extra[0] if event.extra else None
    salt = event.salt
    if salt is None and _is_salt(first, event):
        salt = _keys(first, event.lora)[0]
    return units.space(event.lora, salt)


def _is_salt(extra: Any, event: BlockStored) -> bool:
    """In a first block, a single text besides the LoRA's name is the request's cache_salt."""
    keys = _keys(extra, event.lora)
    return len(keys) == 1 and isinstance(keys[0], str)


def _keys(extra: Any, lora: str | None) -> list[Any]:
    keys = list(extra or ())
    return keys[1:] if keys and lora is not None and keys[0] == lora else keys


def _mixed(state: int, extra: Any, lora: str | None) -> int:
    """Images and the like set a block apart from one with the same tokens."""
    keys = _keys(extra, lora)
    return xxh3_64_intdigest(repr(keys).encode("utf-8", "surrogatepass"), state) if keys else state


def _fastest(tiers: int) -> int:
    return (tiers & -tiers).bit_length() - 1 if tiers else _NOWHERE
