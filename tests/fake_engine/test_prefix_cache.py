"""Prefix hits, eviction and the KV events that announce them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from .conftest import Start
from .running import DEADLINE, FakeEngine, wait_until

Port = Callable[[], int]


class Subscriber:
    """Reads an engine's KV events."""

    def __init__(self, engine: FakeEngine, *, meet: bool = True) -> None:
        self._engine = engine
        self._before = 0
        self.source = engine.get("/kv_event_sources").json()["0"]
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
        self.socket.subscribe(b"")
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(self.source["endpoint"])
        assert self.monitor.poll(int(DEADLINE * 1000)), "no publisher answered"
        if meet:
            self._meet()

    def _meet(self) -> None:
        """Only what comes tells that the publisher knows of us: until then it drops our events."""
        sent = 0

        def came() -> int:
            nonlocal sent
            self._engine.post("/reset_prefix_cache")
            sent += 1
            return self.socket.poll(50)

        wait_until(came, "the first event")
        while True:
            number, _ = self.batch()
            if number + 1 == sent:
                break
        self._before = sent

    def batch(self) -> tuple[int, list[dict[str, Any]]]:
        topic, number, payload = self.socket.recv_multipart()
        _time, events, rank = msgspec.msgpack.decode(payload)
        assert (topic, rank) == (b"", 0)
        return int.from_bytes(number, "big") - self._before, events

    def replay(self, first: int) -> list[tuple[int, list[dict[str, Any]]]]:
        """All kept batches from `first`, up to the end marker."""
        batches: list[tuple[int, list[dict[str, Any]]]] = []
        with self.context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self.source["replay_endpoint"])
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            while True:
                empty, _topic, number, payload = socket.recv_multipart()
                assert empty == b""
                if number == (-1).to_bytes(8, "big", signed=True):
                    return batches
                batches.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)[1]))

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def subscribe() -> Iterator[Callable[..., Subscriber]]:
    subscribers: list[Subscriber] = []

    def one(engine: FakeEngine, **options: bool) -> Subscriber:
        subscribers.append(Subscriber(engine, **options))
        return subscribers[-1]

    yield one
    for subscriber in subscribers:
        subscriber.close()


def with_events(start: Start, free_port: Port, *flags: str) -> FakeEngine:
    config = {
        "enable_kv_cache_events": True,
        "endpoint": f"tcp://127.0.0.1:{free_port()}",
        "replay_endpoint": f"tcp://127.0.0.1:{free_port()}",
    }
    return start("--kv-events-config", json.dumps(config), "--block-size", "4", *flags)


IDS = list(range(100, 112))


def test_a_repeated_prefix_is_not_computed_again(start: Start) -> None:
    engine = start("--block-size", "4")
    engine.complete(IDS, max_tokens=1)
    assert engine.metric("vllm:prefix_cache_hits_total") == 0
    engine.complete([*IDS, 1, 2, 3], max_tokens=1)
    assert engine.metric("vllm:prefix_cache_hits_total") == 12
    assert engine.metric("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 12
    assert engine.metric("vllm:prefix_cache_queries_total") == 27


def test_the_last_token_is_always_computed(start: Start) -> None:
    engine = start("--block-size", "4")
    for _ in range(2):
        engine.complete(IDS, max_tokens=1)
    assert engine.metric("vllm:prefix_cache_hits_total") == 8


def test_usage_tells_cached_tokens_where_it_is_asked_to(start: Start) -> None:
    engine = start("--block-size", "4", "--enable-prompt-tokens-details")
    assert engine.complete(IDS, max_tokens=1)["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = engine.complete([*IDS, 1], max_tokens=1)
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 12}
    body = {"model": "toy", "prompt": [*IDS, 1], "max_tokens": 1, "stream": True}
    events = engine.post("/v1/completions", body | {"stream_options": {"include_usage": True}}).text
    assert '"prompt_tokens_details":{"cached_tokens":12}' in events
    assert start().complete(IDS, max_tokens=1)["usage"]["prompt_tokens_details"] is None


def test_another_cache_salt_shares_nothing(start: Start) -> None:
    engine = start("--block-size", "4")
    engine.complete(IDS, max_tokens=1, cache_salt="a")
    engine.complete(IDS, max_tokens=1, cache_salt="b")
    assert engine.metric("vllm:prefix_cache_hits_total") == 0


def test_stored_blocks_are_announced_with_tokens_and_parents(
    start: Start, free_port: Port, subscribe: Callable[..., Subscriber]
) -> None:
    engine = with_events(start, free_port)
    subscriber = subscribe(engine)
    engine.complete(IDS, max_tokens=1)
    number, events = subscriber.batch()
    assert number == 0
    assert [event["type"] for event in events] == ["BlockStored"] * 3
    assert [event["token_ids"] for event in events] == [IDS[0:4], IDS[4:8], IDS[8:12]]
    assert [event["block_size"] for event in events] == [4, 4, 4]
    hashes = [event["block_hashes"][0] for event in events]
    assert [event["parent_block_hash"] for event in events] == [None, *hashes[:2]]
    assert set(events[0]) == {
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
        "lora_name", "extra_keys", "group_idx",
    }  # fmt: skip
    engine.post("/reset_prefix_cache")
    assert subscriber.batch() == (1, [{"type": "AllBlocksCleared"}])


def test_generated_blocks_are_announced_too_and_hit_in_the_next_turn(
    start: Start, free_port: Port, subscribe: Callable[..., Subscriber]
) -> None:
    engine = with_events(start, free_port)
    subscriber = subscribe(engine)
    answer = engine.complete(IDS, max_tokens=6, return_token_ids=True)["choices"][0]["token_ids"]
    stored: list[int] = []
    while len(stored) < 16:
        for event in subscriber.batch()[1]:
            stored += event["token_ids"]
    assert stored == [*IDS, *answer[:4]]
    engine.complete([*IDS, *answer, 1], max_tokens=1)
    assert engine.metric("vllm:prefix_cache_hits_total") == 16


def test_evicted_blocks_are_announced(
    start: Start, free_port: Port, subscribe: Callable[..., Subscriber]
) -> None:
    engine = with_events(start, free_port, "--kv-blocks", "4")
    subscriber = subscribe(engine)
    engine.complete(IDS[:8], max_tokens=1)
    stored = [event["block_hashes"][0] for event in subscriber.batch()[1]]
    engine.complete([7] * 12, max_tokens=1)
    removed = [e["block_hashes"][0] for e in subscriber.batch()[1] if e["type"] == "BlockRemoved"]
    assert removed == [stored[1]]


def test_missed_batches_can_be_replayed(
    start: Start, free_port: Port, subscribe: Callable[..., Subscriber]
) -> None:
    engine = with_events(start, free_port)
    for i in range(3):
        engine.complete([i] * 4, max_tokens=1)
    subscriber = subscribe(engine, meet=False)
    assert [number for number, _ in subscriber.replay(0)] == [0, 1, 2]
    batches = subscriber.replay(2)
    assert [(number, events[0]["token_ids"]) for number, events in batches] == [(2, [2] * 4)]


def test_requests_wait_for_blocks_and_the_youngest_is_preempted(start: Start) -> None:
    engine = start("--block-size", "4", "--kv-blocks", "8")
    # 4 prompts of 8 tokens fill all 8 blocks; their answers need 8 more.
    body = engine.complete([[i] * 8 for i in range(4)], max_tokens=8)
    assert [len(choice["text"].split()) for choice in body["choices"]] == [8] * 4
    assert engine.metric("vllm:num_preemptions_total") > 0
    roomy = start("--block-size", "4")
    assert roomy.complete([[i] * 8 for i in range(4)], max_tokens=8)["choices"] == body["choices"]
    wait_until(lambda: engine.metric("vllm:kv_cache_usage_perc") == 0, "all blocks to be free")
