"""Following a publisher over real sockets: late, with gaps, over restarts, and when it is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zmq

from hpcserve.engines.kv_events.endpoints import EventEndpoint
from hpcserve.engines.kv_events.reader import KvEventReader

from .publishers import Engine, Follower


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def followers() -> Iterator[list[Follower]]:
    made: list[Follower] = []
    yield made
    for follower in made:
        follower.reader.close()


def follow(followers: list[Follower], *endpoints: EventEndpoint, **options: float) -> Follower:
    follower = Follower(*endpoints, **options)
    followers.append(follower)
    follower.reader.start()
    return follower


async def test_who_comes_late_is_told_everything(engine: Engine, followers: list[Follower]) -> None:
    first = set(engine.store())
    units = {unit for _ in range(4) for unit in engine.store()}
    engine.remove(1)
    follower = follow(followers, engine.endpoint)
    await follower.until(lambda: follower.live and follower.units == units - first)
    assert [message.seq for message in follower.messages] == list(range(len(follower.messages)))


async def test_events_come_as_they_happen(engine: Engine, followers: list[Follower]) -> None:
    follower = follow(followers, engine.endpoint, ask_every=3600.0)
    seen = await follower.joined(engine)
    engine.remove(engine.prompts)
    await follower.until(lambda: not seen <= follower.units)
    assert not follower.warnings


async def test_a_gap_is_replayed(engine: Engine, followers: list[Follower]) -> None:
    follower = follow(followers, engine.endpoint, ask_every=3600.0)
    first = await follower.joined(engine)
    lost = set(engine.store(lost=True)) | set(engine.store(lost=True))
    after = set(engine.store())
    await follower.until(lambda: first | lost | after <= follower.units)
    assert follower.clears == 1  # the one at the start
    assert not follower.warnings


async def test_lost_batches_are_found_without_a_later_one(engine: Engine, followers: list[Follower]) -> None:
    follower = follow(followers, engine.endpoint)
    await follower.until(lambda: follower.live)
    lost = set(engine.store(lost=True))
    await follower.until(lambda: lost <= follower.units)


async def test_batches_that_are_no_longer_kept_leave_nothing_unsure(
    engine: Engine, followers: list[Follower]
) -> None:
    follower = follow(followers, engine.endpoint, ask_every=3600.0)
    await follower.joined(engine)
    for _ in range(3):
        engine.store(lost=True)
    engine.publisher._kept.clear()
    after = set(engine.store())
    await follower.until(lambda: after <= follower.units)
    assert follower.units == after


async def test_a_sequence_that_goes_back_is_an_empty_cache(engine: Engine, followers: list[Follower]) -> None:
    follower = follow(followers, engine.endpoint, ask_every=0.2)
    before = {unit for _ in range(4) for unit in engine.store()}
    await follower.until(lambda: before <= follower.units)
    engine.close()
    engine.start()
    engine.prompts = 100
    await follower.joined(engine)
    await follower.until(lambda: not follower.units & before)
    assert not follower.units & before


async def test_a_new_start_that_has_already_overtaken_the_old_one_is_noticed(
    engine: Engine, followers: list[Follower]
) -> None:
    follower = follow(followers, engine.endpoint, ask_every=0.1)
    before = {unit for _ in range(3) for unit in engine.store()}
    await follower.until(lambda: before <= follower.units)
    engine.close()
    engine.start()
    engine.prompts = 100
    after = {unit for _ in range(50) for unit in engine.store()}
    await follower.until(lambda: follower.units == after)


async def test_a_new_start_whose_next_number_is_the_expected_one_is_noticed(
    engine: Engine, followers: list[Follower]
) -> None:
    follower = follow(followers, engine.endpoint, ask_every=3600.0)
    before = {unit for _ in range(4) for unit in engine.store()}
    await follower.until(lambda: before <= follower.units)
    engine.close()
    engine.start()
    engine.prompts = 100
    connected = engine.publisher._publisher.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED)
    after = {unit for _ in range(4) for unit in engine.store(lost=True)}
    # The subscription follows the handshake; where it comes too late, the gap shows the new start.
    await asyncio.to_thread(connected.poll, 2000)
    await asyncio.sleep(0.2)
    engine.publisher._publisher.disable_monitor()
    after |= set(engine.store())
    await follower.until(lambda: follower.units == after)


async def test_a_silent_source_is_warned_of_once_and_believed_again_when_it_speaks(
    tmp_path: Path, followers: list[Follower]
) -> None:
    endpoint = EventEndpoint(events=f"ipc://{tmp_path}/e", replay=f"ipc://{tmp_path}/r")
    follower = follow(followers, endpoint, ask_every=0.1, patience=0.2)
    await follower.until(lambda: bool(follower.messages))
    assert not follower.live
    engine = Engine(tmp_path)
    try:
        units = set(engine.store())
        await follower.until(lambda: follower.live and units <= follower.units)
    finally:
        engine.close()
    assert len(follower.warnings) <= 1


async def test_without_replay_a_gap_starts_anew(engine: Engine, followers: list[Follower]) -> None:
    follower = follow(followers, EventEndpoint(events=engine.endpoint.events))
    engine.prompts = 100
    first: set[int] = set()
    while not follower.units:
        first |= set(engine.store())
        await asyncio.sleep(0.02)
        follower.take()
    engine.store(lost=True)
    after = set(engine.store())
    await follower.until(lambda: after <= follower.units)
    assert not first & follower.units
    assert follower.live


async def test_bytes_that_are_no_events_are_warned_of_and_forgotten(
    engine: Engine, followers: list[Follower]
) -> None:
    follower = follow(followers, engine.endpoint)
    first = set(engine.store())
    await follower.until(lambda: first <= follower.units)
    engine.publish({"type": "BlockStored", "block_hashes": "none"})
    await follower.until(lambda: not follower.units)
    after = set(engine.store())
    await follower.until(lambda: after <= follower.units)
    assert len(follower.warnings) == 1
    assert "can't be read" in follower.warnings[0]


async def test_a_router_that_missed_something_is_told_everything(
    engine: Engine, followers: list[Follower]
) -> None:
    follower = follow(followers, engine.endpoint)
    units = set(engine.store())
    await follower.until(lambda: follower.live and units <= follower.units)
    follower.messages.clear()
    follower.reader.start_over()
    await follower.until(lambda: bool(follower.messages))
    assert follower.messages[0].seq == 0
    assert follower.messages[0].ops[0][0] == "clear"
    assert follower.units == units
    assert follower.live


async def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        KvEventReader([EventEndpoint(events="nowhere")], worker="w", warn=lambda message, hint: None)
