"""The order in which the processes of one router let their requests in, wherever a connection ended up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from hpcserve.router.keys.identity import BATCH, Identity

from .engines import Client, Engine, World, percentile
from .virtual_time import simulate

PREFILL = 20_000.0


def world() -> World:
    """Two processes, and four engines that compute 80 prompts a second."""
    return World(*[Engine(prefill=PREFILL) for _ in range(4)], declared=PREFILL, processes=2)


def client(name: str, **fields: Any) -> Client:
    return Client(Identity(key=name, name=name, **fields))


def test_keys_that_came_to_different_processes_get_equal_shares() -> None:
    async def scenario() -> None:
        seen, many, few = world(), client("many"), client("few")
        await asyncio.gather(
            seen.offer(many, rate=800, seconds=40),
            seen.offer(few, rate=80, seconds=40, seed=1, process=1),
        )
        await seen.over()
        assert 0.9 < len(many.accepted(10)) / len(few.accepted(10)) < 1.1
        assert len(many.accepted()) + len(few.accepted()) > 0.95 * 80 * 40
        assert seen.empty()

    simulate(scenario())


def test_a_key_is_owed_its_share_where_most_of_its_requests_came_to_one_process() -> None:
    async def scenario() -> None:
        seen, many, few = world(), client("many"), client("few")
        await asyncio.gather(
            seen.offer(many, rate=400, seconds=40),
            seen.offer(many, rate=400, seconds=40, seed=2, process=1),
            seen.offer(few, rate=10, seconds=40, seed=3),
            seen.offer(few, rate=70, seconds=40, seed=1, process=1),
        )
        await seen.over()
        assert 0.9 < len(many.accepted(10)) / len(few.accepted(10)) < 1.1
        assert seen.empty()

    simulate(scenario())


def test_who_came_to_a_process_that_has_nothing_running_waits_no_longer_than_the_others() -> None:
    async def scenario() -> None:
        seen, first, second = world(), client("one"), client("one")
        await asyncio.gather(
            seen.offer(first, rate=200, seconds=50),
            _later(5.0, seen.offer(second, rate=200, seconds=40, seed=1, process=1)),
        )
        await seen.over()
        waits = [
            percentile([one.ttft or 0.0 for one in came.accepted(10, 40)], 0.5) for came in (first, second)
        ]
        assert 0.9 < waits[0] / waits[1] < 1.1
        assert 0.6 < len(first.accepted(10, 40)) / len(second.accepted(10, 40)) < 1.6
        assert seen.empty()

    simulate(scenario())


def test_batch_in_one_process_yields_to_people_in_another_but_is_not_starved() -> None:
    async def scenario() -> None:
        seen, people, batch = world(), client("people"), client("batch", priority=BATCH)
        await asyncio.gather(
            seen.offer(people, rate=200, seconds=60),
            seen.offer(batch, rate=200, seconds=60, seed=1, process=1),
        )
        await seen.over()
        # What came later than this was let in, or refused, after the people had gone.
        assert 1 / 32 < len(batch.accepted(0, 30)) / len(people.accepted()) < 1 / 8
        assert seen.empty()

    simulate(scenario())


def test_a_process_that_stands_still_holds_nobody_up() -> None:
    async def scenario() -> None:
        seen, people, gone = world(), client("people"), client("gone")
        await asyncio.gather(
            seen.offer(people, rate=200, seconds=10),
            seen.offer(gone, rate=200, seconds=10, seed=1, process=1),
        )
        # Its requests wait, and it does not look at them again.
        assert seen.admissions[1].queue.waiting > 10
        seen.admissions[1].close()
        seen.admissions[1].dispatch = lambda: None  # type: ignore[method-assign]
        await seen.offer(people, rate=200, seconds=20, seed=2)
        assert len(people.accepted(12, 27)) > 0.95 * 80 * 15

    simulate(scenario())


async def _later(seconds: float, work: Awaitable[None]) -> None:
    await asyncio.sleep(seconds)
    await work
