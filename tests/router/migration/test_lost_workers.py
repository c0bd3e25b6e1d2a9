"""Engines that die, stop or come back while they write: no stream breaks, and no text differs."""

from __future__ import annotations

import asyncio
import signal

import msgspec
import pytest

from tests.patience import DEADLINE

from .field import Answer, Field, Json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
AGGREGATED = ("aggregated-0", "aggregated-1")
PAIRS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def prompts(count: int, *, chat: bool, tokens: int = 40) -> list[Json]:
    asked: list[Json] = []
    for i in range(count):
        text = f"story number {i} about a fox that is quick and brown"
        body: Json = {"temperature": 0, "max_tokens": tokens}
        if chat:
            asked.append({**body, "messages": [{"role": "user", "content": text}]})
        else:
            asked.append({**body, "prompt": text})
    return asked


async def check(field: Field, path: str, bodies: list[Json], answers: list[Answer]) -> None:
    """All answers are whole and those of an engine that nothing happened to."""
    broken = [answer.error or answer.raw[-300:] for answer in answers if not answer.whole]
    assert not broken, f"{len(broken)} of {len(answers)} streams broke, such as with {broken[0]!r}"
    expected = await asyncio.gather(*(field.expected(path, body) for body in bodies))
    for answer, should in zip(answers, expected, strict=True):
        choice = should["choices"][0]
        assert answer.text == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert answer.finish == {0: choice["finish_reason"]}
        assert len(answer.ids) == 1
        assert answer.roles == ("message" in choice)
        if answer.usage is not None:
            counted = ("prompt_tokens", "completion_tokens", "total_tokens")
            assert [answer.usage[key] for key in counted] == [should["usage"][key] for key in counted]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("engines", [AGGREGATED, PAIRS], ids=["aggregated", "two legs"])
async def test_two_hundred_streams_survive_the_death_of_an_engine(field, engines, path):
    running = await field(*engines)
    bodies = prompts(200, chat=path == CHAT)
    for body in bodies[::2]:
        body["stream_options"] = {"include_usage": True}
    answers = await running.during(path, bodies, lambda: running.kill(engines[-1]))
    await check(running, path, bodies, answers)
    assert [answer.usage is not None for answer in answers] == [True, False] * 100
    assert await running.metric('hpcserve_router_migrations_total{result="resumed"') >= 50
    assert await running.metric('hpcserve_router_migrations_total{result="failed"') == 0
    await running.router.idle()


@pytest.mark.parametrize("engines", [AGGREGATED, PAIRS], ids=["aggregated", "two legs"])
async def test_streams_of_a_stopped_process_go_on_elsewhere(field, engines):
    running = await field(*engines)
    bodies = prompts(30, chat=True, tokens=30)
    answers = await running.during(CHAT, bodies, lambda: running.kill(engines[-1], signal.SIGSTOP))
    await check(running, CHAT, bodies, answers)
    assert await running.metric('hpcserve_router_migrations_total{result="resumed",reason="gone"') >= 10


async def test_slow_engine_that_lives_keeps_its_streams(field):
    running = await field(*AGGREGATED)
    bodies = prompts(4, chat=True, tokens=5)

    def slow() -> None:
        for name in AGGREGATED:
            running.engines[name].fail("slow", factor=220)

    answers = await running.during(CHAT, bodies, lambda: asyncio.to_thread(slow), tokens=2, hold=3)
    await check(running, CHAT, bodies, answers)
    assert await running.metric("hpcserve_router_migrations_total{") == 0


async def test_prefill_engine_that_dies_costs_no_stream(field):
    running = await field(*PAIRS)
    bodies = prompts(60, chat=True)
    first, second = bodies[:30], bodies[30:]

    async def kill_and_ask() -> list[Answer]:
        running.kill("prefill-1")
        await running.tell("release")
        return await asyncio.gather(*(running.stream(CHAT, body) for body in second))

    late: list[Answer] = []

    async def happens() -> None:
        late.extend(await kill_and_ask())

    answers = await running.during(CHAT, first, happens)
    await check(running, CHAT, first, answers)
    await check(running, CHAT, second, late)


async def test_engine_that_starts_again_on_its_port_is_used_again(field):
    running = await field(*AGGREGATED)
    bodies = prompts(40, chat=False, tokens=60)

    async def restart() -> None:
        running.kill("aggregated-1")
        await asyncio.to_thread(running.engines["aggregated-1"].process.wait, 10)
        running.launch("aggregated-1")
        await asyncio.to_thread(lambda: running.engines["aggregated-1"].url)
        running.generation["aggregated-1"] = 1
        await running.announce(*AGGREGATED)

    answers = await running.during(COMPLETIONS, bodies, restart)
    await check(running, COMPLETIONS, bodies, answers)
    again = await asyncio.gather(*(running.stream(COMPLETIONS, body) for body in bodies))
    await check(running, COMPLETIONS, bodies, again)
    assert running.engines["aggregated-1"].metric("vllm:request_success_total", finished_reason="length") > 0


@pytest.mark.parametrize("engines", [AGGREGATED, PAIRS], ids=["aggregated", "two legs"])
async def test_streams_leave_a_worker_that_is_taken_away_and_one_that_shuts_down(field, engines):
    """A node that drains: the head takes the worker out, and then the engine is told to stop."""
    running = await field(*engines)
    bodies = prompts(20, chat=True, tokens=60)

    async def drain() -> None:
        await running.announce(*engines[:-1])
        running.kill(engines[-1], signal.SIGTERM)

    await check(running, CHAT, bodies, await running.during(CHAT, bodies, drain))
    running.engines[engines[-1]].process.wait(DEADLINE)
    running.launch(engines[-1])
    await asyncio.to_thread(lambda: running.engines[engines[-1]].url)
    running.generation[engines[-1]] = 1
    await running.announce(*engines)
    again = await running.during(CHAT, bodies, lambda: running.kill(engines[-1], signal.SIGTERM))
    await check(running, CHAT, bodies, again)


async def test_stream_goes_on_more_than_once(field):
    names = ("aggregated-0", "aggregated-1", "aggregated-2", "aggregated-3")
    running = await field(*names)
    bodies = prompts(24, chat=True, tokens=80)

    async def one_after_another() -> None:
        for name in names[1:]:
            running.kill(name)
            await asyncio.sleep(0.4)

    answers = await running.during(CHAT, bodies, one_after_another)
    await check(running, CHAT, bodies, answers)


async def test_choices_of_one_request_go_on_each_by_itself(field):
    running = await field(*PAIRS)
    body: Json = {
        "messages": [{"role": "user", "content": "tell me more than once"}],
        "n": 6, "seed": 5, "max_tokens": 40, "stream_options": {"include_usage": True},
    }  # fmt: skip
    (answer,) = await running.during(CHAT, [body], lambda: running.kill("decode-1"), tokens=24)
    assert answer.whole
    should = await running.expected(CHAT, {key: body[key] for key in body if key != "stream_options"})
    assert answer.texts == {choice["index"]: choice["message"]["content"] for choice in should["choices"]}
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == should["usage"]["completion_tokens"]


async def test_answers_that_are_no_streams_are_asked_for_again(field):
    running = await field(*PAIRS)
    bodies = prompts(20, chat=True)
    raws = [{**body, "model": "toy"} for body in bodies]

    async def ask(body: Json) -> str:
        response = await running.pool.request("POST", running.base + CHAT, body=msgspec.json.encode(body))
        answer = msgspec.json.decode(await response.read(1 << 24))
        return str(answer["choices"][0]["message"]["content"])

    tasks = [asyncio.create_task(ask(body)) for body in raws]
    async with asyncio.timeout(DEADLINE):
        while await running.running() < 15:  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.02)
    running.kill("decode-1")
    texts = await asyncio.gather(*tasks)
    expected = await asyncio.gather(*(running.expected(CHAT, body) for body in bodies))
    assert texts == [answer["choices"][0]["message"]["content"] for answer in expected]
