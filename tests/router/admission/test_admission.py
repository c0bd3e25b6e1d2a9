"""Admission as a whole, with engines of a few lines and a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hpcserve.http.errors import HttpError
from hpcserve.router.admission.admission import Admission
from hpcserve.router.demand import Demand
from hpcserve.router.keys.identity import BATCH, RUN, Identity, Limits

from .engines import Client, Engine, World, percentile
from .virtual_time import simulate

PROMPT = 1000


def world(*, prefill: float = 20_000.0, **settings: Any) -> World:
    """Four engines, which compute 80 prompts a second."""
    return World(*[Engine(prefill=prefill) for _ in range(4)], **({"declared": prefill} | settings))


def key(name: str, **fields: Any) -> Identity:
    return Identity(key=name, name=name, **fields)


def test_an_idle_endpoint_lets_everything_in_at_once() -> None:
    async def scenario() -> None:
        seen = world()
        client = Client(RUN)
        await seen.offer(client, rate=20, seconds=30)
        await seen.over()
        assert len(client.seen) == len(client.accepted()) > 400
        assert max(one.ttft or 0.0 for one in client.seen) < 1.0
        assert seen.empty()

    simulate(scenario())


@pytest.mark.parametrize("declared", [20_000.0, None], ids=["declared", "unmeasured"])
def test_ten_times_overload_keeps_waits_bounded_refuses_at_once_and_recovers(declared: float | None) -> None:
    async def scenario() -> None:
        seen, client, loop = world(declared=declared), Client(RUN), asyncio.get_running_loop()
        await seen.offer(client, rate=800, seconds=60)
        accepted, refused = client.accepted(), client.refused()
        # The engines are kept busy, and what waits does not do so for much longer than it may.
        assert len(accepted) > 0.95 * 80 * 60
        assert percentile([one.ttft or 0.0 for one in accepted], 0.99) < 2.0 * 1.5 + 1.0
        at_once = [one for one in refused if one.refused_after == 0.0]
        assert len(at_once) > 0.95 * len(refused)
        assert all(one.retry_after >= 1 and one.reason == "prefill_queue_full" for one in refused)
        end = loop.time()
        await seen.offer(client, rate=40, seconds=20, seed=1)
        await seen.over()
        assert not client.refused(end + 1.0)
        assert max(one.ttft or 0.0 for one in client.accepted(end + 5.0)) < 2.0
        assert seen.empty()

    simulate(scenario())


@pytest.mark.parametrize(
    "settings", [{}, {"prefill": 200_000.0, "kv_tokens": 50_000.0}], ids=["prompts", "kv-cache"]
)
def test_keys_at_ten_to_one_offered_load_get_equal_shares(settings: dict[str, float]) -> None:
    async def scenario() -> None:
        seen = world(**settings)
        many, few = Client(key("many")), Client(key("few"))
        await asyncio.gather(
            seen.offer(many, rate=800, seconds=40), seen.offer(few, rate=80, seconds=40, seed=1)
        )
        await seen.over()
        ratio = len(many.accepted(10)) / len(few.accepted(10))
        assert 0.9 < ratio < 1.1
        assert seen.empty()

    simulate(scenario())


def test_a_light_key_is_not_held_up_by_a_heavy_one() -> None:
    async def scenario() -> None:
        seen = world()
        heavy, light = Client(key("heavy")), Client(key("light"))
        await asyncio.gather(
            seen.offer(heavy, rate=400, seconds=30), seen.offer(light, rate=20, seconds=30, seed=1)
        )
        await seen.over()
        assert not light.refused()
        alone = percentile([one.ttft or 0.0 for one in light.seen], 0.99)
        assert alone < 0.6 * percentile([one.ttft or 0.0 for one in heavy.accepted()], 0.99)

    simulate(scenario())


def test_batch_yields_to_interactive_but_is_not_starved() -> None:
    async def scenario() -> None:
        seen = world()
        people, batch = Client(key("people")), Client(key("batch", priority=BATCH))
        await asyncio.gather(
            seen.offer(people, rate=200, seconds=60), seen.offer(batch, rate=200, seconds=60, seed=1)
        )
        await seen.over()
        assert len(people.accepted()) > 8 * len(batch.accepted(0, 30)) > 0

    simulate(scenario())


def test_batch_has_what_interactive_leaves() -> None:
    async def scenario() -> None:
        seen = world()
        people, batch = Client(key("people")), Client(RUN)
        await asyncio.gather(
            seen.offer(people, rate=40, seconds=60),
            seen.offer(batch, rate=200, seconds=60, seed=1, priority=-5),
        )
        await seen.over()
        assert not people.refused()
        assert len(batch.accepted()) > 0.8 * 40 * 60

    simulate(scenario())


def test_a_client_may_ask_for_less_than_its_key_has_but_not_for_more() -> None:
    async def scenario() -> None:
        admission = world().admission
        urgent = Demand(prompt_tokens=1, output_tokens=1, priority=7)
        lazy = Demand(prompt_tokens=1, output_tokens=1, priority=-7)
        assert admission.admit(key("b", priority=BATCH), urgent).priority == BATCH
        assert admission.admit(RUN, lazy).priority == BATCH
        assert admission.admit(RUN, urgent).priority == 0

    simulate(scenario())


def hold(admission: Admission, tokens: int) -> Callable[[], Any]:
    """A context that takes up prefill tokens."""
    return lambda: admission.admit(RUN, Demand(prompt_tokens=tokens, output_tokens=0))


def test_who_leaves_while_waiting_leaves_nothing() -> None:
    async def scenario() -> None:
        seen = world()
        admission = seen.admission
        limited = key("k", limits=Limits(concurrent=1, tokens_per_minute=10_000, tokens_total=10_000))
        demand = Demand(prompt_tokens=100, output_tokens=10)
        async with hold(admission, 1_000_000)():
            ticket = admission.admit(limited, demand)
            waiting = asyncio.create_task(ticket.__aenter__())
            await asyncio.sleep(0.01)
            assert admission.queue.waiting == 1
            waiting.cancel()
            await asyncio.wait((waiting,))
            assert admission.queue.waiting == 0
        assert seen.empty()
        async with admission.admit(limited, demand):
            pass

    simulate(scenario())


def test_who_is_let_in_and_cancelled_in_one_moment_gives_its_place_back() -> None:
    async def scenario() -> None:
        seen = world()
        admission = seen.admission
        held = hold(admission, 1_000_000)()
        await held.__aenter__()
        waiting = asyncio.create_task(
            admission.admit(RUN, Demand(prompt_tokens=100, output_tokens=10)).__aenter__()
        )
        await asyncio.sleep(0.01)
        await held.__aexit__(None, None, None)  # lets the waiting one in
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert waiting.cancelled()
        assert seen.empty()

    simulate(scenario())


def test_a_prompt_above_every_budget_goes_when_nothing_else_runs() -> None:
    async def scenario() -> None:
        seen, client = world(kv_tokens=5_000.0), Client(RUN)
        await seen.ask(client, 100_000, 10)
        assert len(client.accepted()) == 1

    simulate(scenario())


def test_without_workers_nothing_is_held_back() -> None:
    async def scenario() -> None:
        seen = world()
        seen.table.update(())
        for _ in range(100):
            await seen.admission.admit(RUN, Demand(prompt_tokens=10_000, output_tokens=1)).__aenter__()

    simulate(scenario())


def test_answers_that_are_not_streamed_do_not_count_as_prompts_until_their_end() -> None:
    async def scenario() -> None:
        seen, client = world(), Client(RUN)
        asks = [seen.ask(client, PROMPT, 5000, streams=False) for _ in range(400)]
        tasks = []
        for ask in asks:  # 40 a second, each of which takes 100 s to write
            tasks.append(asyncio.create_task(ask))
            await asyncio.sleep(0.025)
        await asyncio.wait(tasks)
        assert not client.refused()
        assert seen.empty()

    simulate(scenario())


def test_a_request_is_charged_for_what_the_engine_counted() -> None:
    async def scenario() -> None:
        admission = world().admission
        user = key("u", limits=Limits(tokens_total=1000))
        async with admission.admit(user, Demand(prompt_tokens=10, output_tokens=10, model="m")) as ticket:
            ticket.first_byte()
            ticket.used(prompt_tokens=600, cached_tokens=64, completion_tokens=300)
            ticket.used(prompt_tokens=0, cached_tokens=0, completion_tokens=100)
        assert admission.meter.take() == [("u", "u", "m", 1, 600, 64, 400)]
        with pytest.raises(HttpError) as refusal:
            async with admission.admit(user, Demand(prompt_tokens=10, output_tokens=10)):
                pass
        assert refusal.value.status == 403
        assert (b"x-hpcserve-reason", b"token_quota_used_up") in refusal.value.headers

    simulate(scenario())


def test_a_stream_that_broke_is_charged_its_estimate_and_a_failed_request_nothing() -> None:
    async def scenario() -> None:
        admission = world().admission
        demand = Demand(prompt_tokens=10, output_tokens=20, model="m")
        with pytest.raises(ZeroDivisionError):
            async with admission.admit(RUN, demand) as ticket:
                ticket.first_byte()
                raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            async with admission.admit(RUN, demand):
                raise ZeroDivisionError
        assert admission.meter.take() == [("run", "run", "m", 1, 10, 0, 20)]

    simulate(scenario())
