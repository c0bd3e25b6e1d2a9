"""Batches as engines encode them, today's and older ones, and what is no batch."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.engines.kv_events.format import (
    CPU,
    GPU,
    STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    decode,
)
from hpcserve.engines.kv_events.reader import KvEventReader
from tests.patience import DEADLINE

STORED = {
    "type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": 6, "token_ids": [1, 2, 3, 4],
    "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": "adapter",
}  # fmt: skip


def batch(*events: Any, more: tuple[Any, ...] = (0,)) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), *more])


def test_events_of_todays_vllm_are_maps() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "CPU"}
    assert decode(batch(STORED, removed, {"type": "AllBlocksCleared"})) == [
        BlockStored(hashes=[7, 8], parent=6, tokens=[1, 2, 3, 4], block_size=2, tier=GPU, lora="adapter"),
        BlockRemoved(hashes=[7], tier=CPU),
        AllBlocksCleared(),
    ]


def test_events_of_older_engines_are_arrays() -> None:
    stored = ["BlockStored", [b"x", b"y"], None, [1, 2], 1, 3]
    assert decode(batch(stored, ["BlockRemoved", [b"x"]], ["AllBlocksCleared"], more=())) == [
        BlockStored(hashes=[b"x", b"y"], parent=None, tokens=[1, 2], block_size=1, tier=GPU, lora="#3"),
        BlockRemoved(hashes=[b"x"], tier=None),
        AllBlocksCleared(),
    ]


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        ("GPU", GPU),
        ("CPU", CPU),
        ("CPU_PINNED", CPU),
        ("STORAGE", STORAGE),
        ("DISK", STORAGE),
        ("EXTERNAL", STORAGE),
        (None, GPU),
    ],
)
def test_memories_of_vllm_and_sglang(medium: str | None, tier: int) -> None:
    (event,) = decode(batch({**STORED, "medium": medium}))
    assert isinstance(event, BlockStored)
    assert event.tier == tier


def test_sglang_names_the_cache_salt() -> None:
    (event,) = decode(batch({**STORED, "cache_salt": "s", "session_id": "x"}))
    assert isinstance(event, BlockStored)
    assert event.salt == "s"


def test_what_later_versions_add_is_passed_over() -> None:
    event = {**STORED, "ownership": "tier-2", "something": [{"new": 1}]}
    other = {"type": "BlocksRenamed", "from": [1]}
    assert len(decode(batch(event, other, more=(0, "more", {"x": 1})))) == 1


def test_of_a_hybrid_model_one_group_of_layers_counts() -> None:
    events = [{**STORED, "group_idx": group} for group in (0, 1, 2)]
    assert len(decode(batch(*events))) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, "events"]),
        batch(7),
        batch([]),
        batch({"type": "BlockStored"}),
        batch({**STORED, "token_ids": [1, 2, 3]}),
        batch({**STORED, "block_hashes": 7}),
        batch({**STORED, "medium": 3}),
        batch({"type": "BlockRemoved", "block_hashes": None}),
        b"\x91" * 5000,
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError):
        decode(payload)


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(payload: bytes) -> None:
    try:
        decode(payload)
    except ValueError:
        return


@pytest.mark.timeout(300)
def test_vllms_own_classes_and_publisher_are_understood(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its event classes, its encoder, and its names for the sockets of other data-parallel ranks."""
    vllm = pytest.importorskip("vllm.distributed.kv_events")
    from hpcserve.engines.kv_events import endpoints

    events = [
        vllm.BlockStored(
            block_hashes=[7], parent_block_hash=None, token_ids=[1, 2], block_size=2, lora_id=None,
            medium="GPU", lora_name=None, extra_keys=[("salt",)], group_idx=0,
        ),
        vllm.BlockRemoved(block_hashes=[7], medium="CPU"),
        vllm.AllBlocksCleared(),
    ]  # fmt: skip
    payload = msgspec.msgpack.Encoder().encode(vllm.KVEventBatch(ts=1.0, events=events))
    assert decode(payload) == [
        BlockStored(hashes=[7], parent=None, tokens=[1, 2], block_size=2, tier=GPU, extra=[["salt"]]),
        BlockRemoved(hashes=[7], tier=CPU),
        AllBlocksCleared(),
    ]
    scratch = "/tmp/hs-12345678/decode-0"
    told = endpoints.config(scratch)
    for rank, found in enumerate(endpoints.in_directory(scratch, range(3))):
        offset = vllm.ZmqEventPublisher.offset_endpoint_port
        assert offset(told["endpoint"], rank) == found.events
        assert offset(told["replay_endpoint"], rank) == found.replay
        assert vllm.ZmqEventPublisher._is_bind_endpoint(found.events)


@pytest.mark.timeout(300)
async def test_vllms_own_publisher_is_followed(tmp_path_factory: pytest.TempPathFactory) -> None:
    vllm = pytest.importorskip("vllm.distributed.kv_events")
    import asyncio

    from hpcserve.engines.kv_events import endpoints

    scratch = str(tmp_path_factory.mktemp("kv"))
    told = endpoints.config(scratch)
    publisher = vllm.ZmqEventPublisher(1, told["endpoint"], told["replay_endpoint"])
    (place,) = endpoints.in_directory(scratch, [1])
    reader = KvEventReader(
        [place], worker="w", warn=lambda message, hint: pytest.fail(message), ask_every=0.2
    )
    try:
        stored = vllm.BlockStored(
            block_hashes=[7], parent_block_hash=None, token_ids=list(range(256)), block_size=256,
            lora_id=None, medium="GPU", lora_name=None,
        )  # fmt: skip
        publisher.publish(vllm.KVEventBatch(ts=1.0, events=[stored]))
        reader.start()
        told_units = 0
        async with asyncio.timeout(DEADLINE):
            while told_units < 2 or not reader.live:
                await reader.changed.wait()
                reader.changed.clear()
                told_units += sum(len(op[2]) // 8 for message in reader.news() for op in message.ops)
    finally:
        reader.close()
        publisher.shutdown()
