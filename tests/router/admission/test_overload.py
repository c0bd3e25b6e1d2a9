"""Overload of a real router with real processes: counts and ratios, no wall-clock figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import DEADLINE

from .live import Client, Live

MANY, FEW = 300, 30
WORDS = 400
"""Of a prompt: the engine computes 25 of these a second, and few of them lie in its own queue."""


async def _until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - a test may poll
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited {DEADLINE} s for {what}") from None


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [1, 2])
async def test_two_keys_at_ten_to_one_get_equal_shares_and_the_rest_is_refused(
    tmp_path: Path, processes: int
) -> None:
    live = Live(tmp_path, processes=processes, queue=1.0)
    many, few = live.client("many"), live.client("few")
    async with live:
        tasks = [asyncio.create_task(live.insist(many, words=WORDS)) for _ in range(MANY)]
        tasks += [asyncio.create_task(live.insist(few, words=WORDS)) for _ in range(FEW)]
        await _until(lambda: len(many.accepted()) + len(few.accepted()) >= 100, "a full queue")
        before = len(many.accepted()), len(few.accepted())
        await _until(lambda: len(many.accepted()) + len(few.accepted()) >= 350, "shares")
        shares = len(many.accepted()) - before[0], len(few.accepted()) - before[1]
        await _end(tasks)
        # A process that the machine stalls for a second is not waited for.
        tolerance = 1.1 if processes == 1 else 1.25
        assert 1 / tolerance < shares[0] / shares[1] < tolerance, shares
        refused = many.refused() + few.refused()
        assert len(refused) > 50
        assert {seen.reason for seen in refused} == {"prefill_queue_full"}
        assert all(int(seen.retry_after) >= 1 for seen in refused)
        assert {seen.status for seen in many.seen + few.seen} == {200, 429}
        await _gone(live, many)
        accepted = len(many.accepted()) + len(few.accepted())
    written = live.usage()
    assert {used.name for used in written.used.values()} == {"many", "few"}
    assert sum(used.requests for used in written.used.values()) >= accepted
    assert sum(time.busy for time in written.times.values()) > 0.0


async def _asked(live: Live, client: Client, status: int) -> None:
    """Ask until the answer has this status."""
    async with asyncio.timeout(DEADLINE):
        while (await live.ask(client)).status != status:  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.05)


async def _gone(live: Live, client: Client) -> None:
    """Nothing is left of requests that were cancelled or refused."""
    async with asyncio.timeout(DEADLINE):
        while True:
            figures = await live.metrics(client)
            waiting = sum(
                v for name, v in figures.items() if name.startswith("hpcserve_router_queue_requests")
            )
            if waiting == 0.0 and figures["hpcserve_router_body_bytes"] == 0.0:
                return
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_limits_of_a_key_hold_over_processes_and_a_revoked_key_is_refused(tmp_path: Path) -> None:
    live = Live(tmp_path, processes=2, prefill=1_000_000.0)
    narrow = live.client("narrow", concurrent=2)
    spent = live.client("spent", tokens=600)
    elsewhere = live.client("elsewhere", models=("other",))
    async with live:
        tasks = [asyncio.create_task(live.ask(narrow, words=5, answer=2000)) for _ in range(8)]
        # Two that come to two processes in one moment may both be refused the last place.
        await _until(lambda: len(narrow.refused()) >= 6, "six of eight to be refused")
        assert {seen.reason for seen in narrow.refused()} == {"concurrent_requests"}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _asked(live, narrow, 200)
        await _asked(live, spent, 403)
        assert spent.seen[-1].reason == "token_quota_used_up"
        assert (await live.ask(elsewhere)).status in (403, 404)
        live.keys.revoke("narrow")
        await _asked(live, narrow, 401)
