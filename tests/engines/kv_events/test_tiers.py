"""Blocks that vLLM's OffloadingConnector keeps in memory, from its events to what the router is told."""

from __future__ import annotations

from typing import Any

import msgspec

from hpcserve.engines.kv_events.digest import Digest
from hpcserve.engines.kv_events.format import CPU, GPU, decode
from hpcserve.engines.kv_events.units import UNIT, space, token_bytes, units_of

BLOCK = 2 * UNIT
TOKENS = list(range(3 * BLOCK))


def stored(medium: str, *blocks: int) -> dict[str, Any]:
    """As `self_describing_kv_events` makes it: with the tokens, and the same hashes as the GPU's events
    (vllm/distributed/kv_transfer/kv_connector/v1/offloading/events.py)."""
    first = blocks[0]
    event = {
        "type": "BlockStored", "block_hashes": [100 + block for block in blocks],
        "parent_block_hash": 99 + first if first else None,
        "token_ids": TOKENS[first * BLOCK : (blocks[-1] + 1) * BLOCK],
        "block_size": BLOCK, "lora_id": None, "medium": medium, "lora_name": None,
    }  # fmt: skip
    more = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    return event if medium == "GPU" else {**event, **more}


def removed(medium: str, *blocks: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [100 + block for block in blocks], "medium": medium}


def after(digest: Digest, *events: dict[str, Any]) -> tuple[dict[int, int], int]:
    """How many units came to be in which memory, and how many are gone."""
    digest.apply(decode(msgspec.msgpack.encode([1.0, list(events), 0])))
    changes = digest.changes()
    return {tier: len(units) for tier, units in changes.stored.items()}, len(changes.dropped)


def test_what_leaves_the_gpu_is_still_known_to_be_in_memory() -> None:
    digest, units = Digest(), len(units_of(token_bytes(TOKENS), space()))
    assert after(digest, stored("GPU", 0, 1, 2)) == ({GPU: units}, 0)
    # Each chunk is told by itself; as long as the GPU has it, that is what counts.
    copies = [stored("CPU", block) for block in range(3)]
    assert after(digest, *copies) == ({}, 0)
    assert after(digest, removed("GPU", 2, 1)) == ({CPU: 2 * units // 3}, 0)
    assert after(digest, removed("GPU", 0)) == ({CPU: units // 3}, 0)
    # Loaded again, and in both from now on.
    assert after(digest, stored("GPU", 0)) == ({GPU: units // 3}, 0)
    assert after(digest, removed("CPU", 2)) == ({}, units // 3)
    assert after(digest, removed("CPU", 0)) == ({}, 0)


def test_a_block_in_memory_counts_only_as_far_as_its_beginning_is_there() -> None:
    digest, units = Digest(), len(units_of(token_bytes(TOKENS), space()))
    after(digest, stored("GPU", 0, 1, 2), stored("CPU", 1), stored("CPU", 2))
    assert after(digest, removed("GPU", 0, 1, 2)) == ({}, units)
