from __future__ import annotations

from typing import Any

from hpcserve.engines.fake_server.kv_cache import BlockPool, event_hash, hash_block

SIZE = 2


def chain(ids: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    for i in range(0, len(ids), SIZE):
        hashes.append(hash_block(hashes[-1] if hashes else None, tuple(ids[i : i + SIZE])))
    return hashes


def store(pool: BlockPool, ids: list[int]) -> list[int]:
    """Allocate, cache and free the blocks of `ids`."""
    hashes = chain(ids)
    blocks = pool.allocate(len(hashes))
    for i, block in enumerate(blocks):
        pool.cache(block, hashes[i], hashes[i - 1] if i else None, ids[i * SIZE : (i + 1) * SIZE], None)
    pool.release(blocks)
    return blocks


def test_block_hashes_are_those_of_vllm() -> None:
    # sha256 over pickle in vLLM 0.32: hash_block_tokens(sha256, None, [1, 2]) with the default seed.
    first = hash_block(None, (1, 2))
    assert event_hash(first) == 8547672708782733172
    assert event_hash(hash_block(first, (3, 4))) == 9710611752188425781


def test_the_block_used_longest_ago_is_evicted_first_and_announced() -> None:
    events: list[dict[str, Any]] = []
    pool = BlockPool(4, SIZE, events.append)
    old, new = chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    store(pool, [1, 2, 3, 4])
    store(pool, [5, 6, 7, 8])
    pool.take(pool.match(old[:1]))
    pool.allocate(1)
    removed = [e["block_hashes"] for e in events if e["type"] == "BlockRemoved"]
    assert removed == [[event_hash(old[1])]]
    assert len(pool.match(new)) == 2


def test_the_end_of_a_prefix_goes_before_its_start() -> None:
    pool = BlockPool(3, SIZE)
    hashes = chain([1, 2, 3, 4, 5, 6])
    store(pool, [1, 2, 3, 4, 5, 6])
    pool.allocate(1)
    assert len(pool.match(hashes)) == 2


def test_shared_blocks_stay_until_their_last_user_leaves() -> None:
    pool = BlockPool(2, SIZE)
    hashes = chain([1, 2, 3, 4])
    store(pool, [1, 2, 3, 4])
    cached = pool.match(hashes)
    pool.take(cached)
    pool.take(cached)
    pool.release(cached)
    assert pool.free == 0
    pool.release(cached)
    assert pool.free == 2
    assert pool.usage == 0.0


def test_clearing_needs_an_idle_pool() -> None:
    events: list[dict[str, Any]] = []
    pool = BlockPool(2, SIZE, events.append)
    store(pool, [1, 2])
    held = pool.allocate(1)
    assert not pool.clear()
    pool.release(held)
    assert pool.clear()
    assert events[-1] == {"type": "AllBlocksCleared"}
    assert pool.match(chain([1, 2])) == []
