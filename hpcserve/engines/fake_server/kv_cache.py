"""The KV block pool: reference counts, prefix cache, least recently used eviction.

Block hashes are those of vLLM 0.32's default algorithm (SHA-256 over the pickle of parent hash,
tokens and extra keys; the first parent derives from the constant "vllm-none-hash"), so that equal
prefixes have equal hashes on all engines.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

Event = dict[str, Any]
EventSink = Callable[[Event], None]

MEDIUM = "GPU"


def _sha256(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)).digest()


_NONE_HASH = _sha256(os.environ.get("PYTHONHASHSEED", "vllm-none-hash"))


def hash_block(parent: bytes | None, ids: tuple[int, ...], salt: str | None = None) -> bytes:
    """Hash of a full block. `salt` is the request's cache_salt, part of the first block only."""
    return _sha256((parent or _NONE_HASH, ids, (("cache_salt", salt),) if salt else None))


def event_hash(block_hash: bytes) -> int:
    """The number that stands for a block in KV events: the low 64 bits of its hash."""
    return int.from_bytes(block_hash[-8:], "big")


class BlockPool:
    """`blocks` KV blocks of `block_size` tokens. Freed blocks stay cached until they are needed."""

    def __init__(self, blocks: int, block_size: int, on_event: EventSink | None = None) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._on_event = on_event
        self._references = [0] * blocks
        self._hash_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        # Free blocks, the least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks held by requests, 0 to 1."""
        return 1.0 - len(self._free) / self.blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest prefix of `hashes`, without taking them."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def available(self, cached: Sequence[int]) -> int:
        """Blocks that could be allocated after `cached` ones were taken."""
        return len(self._free) - sum(1 for block in cached if self._references[block] == 0)

    def take(self, cached: Sequence[int]) -> None:
        """Reference cached blocks."""
        for block in cached:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` fresh blocks, evicting what was used longest ago. The caller checked `free`."""
        fresh: list[int] = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._evict(block)
            self._references[block] = 1
            fresh.append(block)
        return fresh

    def release(self, held: Sequence[int]) -> None:
        """Drop one reference to each block; the end of a prefix is evicted before its start."""
        for block in reversed(held):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def cache(
        self, block: int, block_hash: bytes, parent: bytes | None, ids: Sequence[int], salt: str | None
    ) -> None:
        """Make a full block findable. A second block with the same hash is not announced."""
        if self._hash_of[block] is not None or block_hash in self._block_of:
            return
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        if self._on_event is None:
            return
        self._on_event(
            {
                "type": "BlockStored",
                "block_hashes": [event_hash(block_hash)],
                "parent_block_hash": None if parent is None else event_hash(parent),
                "token_ids": list(ids),
                "block_size": self.block_size,
                "lora_id": None,
                "medium": MEDIUM,
                "lora_name": None,
                "extra_keys": [[salt] if salt else None],
                "group_idx": 0,
            }
        )

    def clear(self) -> bool:
        """Forget all cached prefixes; False (and nothing done) while blocks are in use, as in vLLM."""
        if len(self._free) != self.blocks:
            return False
        self._hash_of = [None] * self.blocks
        self._block_of.clear()
        if self._on_event is not None:
            self._on_event({"type": "AllBlocksCleared"})
        return True

    def _evict(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is None:
            return
        self._hash_of[block] = None
        del self._block_of[block_hash]
        if self._on_event is not None:
            self._on_event(
                {
                    "type": "BlockRemoved",
                    "block_hashes": [event_hash(block_hash)],
                    "medium": MEDIUM,
                    "group_idx": 0,
                }
            )
