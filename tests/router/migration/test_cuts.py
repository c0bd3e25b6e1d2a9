"""Where a stream is cut: in a character, in a stop string; and what can't go on from there."""

from __future__ import annotations

import asyncio

import pytest

from hpcserve.router.config import WorkerSpec
from hpcserve.router.control import Table
from tests.patience import DEADLINE
from tests.router.conftest import start

from .field import JOB_KEY, Answer, Field, Json

__all__ = ["start"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
AGGREGATED = ("aggregated-0", "aggregated-1")
PAIRS = ("prefill-0", "decode-0", "decode-1")
STREAMS = 12


def bodies(path: str, **fields: object) -> list[Json]:
    texts = [f"number {i} of a few questions about the sea" for i in range(STREAMS)]
    if path == CHAT:
        return [{"messages": [{"role": "user", "content": text}], **fields} for text in texts]
    return [{"prompt": text, **fields} for text in texts]


async def texts(field: Field, path: str, asked: list[Json]) -> list[str]:
    found = []
    for answer in await asyncio.gather(*(field.expected(path, body) for body in asked)):
        choice = answer["choices"][0]
        found.append(choice["message"]["content"] if "message" in choice else choice["text"])
    return found


@pytest.mark.parametrize("interval", ["1", "3"])
@pytest.mark.parametrize("engines", [AGGREGATED, PAIRS], ids=["aggregated", "two legs"])
async def test_cut_in_the_middle_of_a_character_leaves_no_mark(field, engines, interval):
    """Every character is two tokens: half of the streams are cut after the first of them."""
    running = await field(*engines, flags=["--speech", "emoji", "--stream-interval", interval])
    asked = bodies(CHAT, temperature=0, max_tokens=50)
    for body in asked[::2]:
        body["max_tokens"] = 51
    answers = await running.during(CHAT, asked, lambda: running.kill(engines[-1]))
    assert all(answer.whole for answer in answers), answers[0].raw[-300:]
    assert [answer.text for answer in answers] == await texts(running, CHAT, asked)
    assert not any("\ufffd" in answer.text for answer in answers)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("interval", ["1", "4"])
async def test_stop_string_that_the_cut_goes_through_ends_the_answer(field, interval, temperature):
    """The stop string of each stream is what lies at the cut: the engine holds it back when it dies."""
    running = await field(*AGGREGATED, flags=["--stream-interval", interval])
    plain = bodies(COMPLETIONS, temperature=temperature, seed=7, max_tokens=60)
    whole = await texts(running, COMPLETIONS, plain)
    asked = []
    for i, (body, text) in enumerate(zip(plain, whole, strict=True)):
        place = 3 * (6 + i) + i % 3
        asked.append({**body, "stop": [text[place : place + 19], "never seen"]})
    answers = await running.during(COMPLETIONS, asked, lambda: running.kill("aggregated-1"), tokens=1)
    expected = await texts(running, COMPLETIONS, asked)
    assert all(answer.whole for answer in answers), answers[0].raw[-300:]
    assert [answer.text for answer in answers] == expected
    assert all(answer.finish == {0: "stop"} for answer in answers)


async def test_answer_without_a_limit_ends_where_it_would_have(field):
    running = await field(*AGGREGATED)
    asked = bodies(CHAT, temperature=0, min_tokens=30)
    answers = await running.during(CHAT, asked, lambda: running.kill("aggregated-1"))
    assert all(answer.whole for answer in answers)
    assert [answer.text for answer in answers] == await texts(running, CHAT, asked)
    assert {answer.finish[0] for answer in answers} == {"stop"}


async def test_what_the_client_asked_to_see_goes_on_in_the_same_form(field):
    running = await field(*AGGREGATED)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = bodies(COMPLETIONS, temperature=0, max_tokens=40, return_token_ids=True, stream_options=options)
    answers = await running.during(COMPLETIONS, asked, lambda: running.kill("aggregated-1"))
    expected = await asyncio.gather(*(running.expected(COMPLETIONS, body) for body in asked))
    for answer, should in zip(answers, expected, strict=True):
        assert answer.whole
        assert answer.token_ids == should["choices"][0]["token_ids"]
        assert answer.raw.count(b'"usage":{"prompt_tokens"') == 41
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == 40
    assert b'"token_ids":[' in answers[0].raw


async def test_ids_and_usage_that_nobody_asked_for_are_not_shown(field):
    running = await field(*AGGREGATED)
    for path in (CHAT, COMPLETIONS):
        (answer,) = await running.during(
            path, bodies(path, max_tokens=20)[:1], lambda: running.kill("aggregated-1"), tokens=2
        )
        assert answer.whole
        assert b'token_ids":[' not in answer.raw
        assert b"usage" not in answer.raw


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
STATEFUL = [
    {"response_format": SCHEMA},
    {"tools": TOOLS},
    {"presence_penalty": 0.5},
    {"logprobs": True, "top_logprobs": 2},
    {"structured_outputs": {"json": {"type": "object"}}},
]


@pytest.mark.parametrize("fields", STATEFUL, ids=lambda fields: next(iter(fields)))
async def test_stateful_stream_is_repeated_when_greedy_and_else_ends_with_a_clear_error(field, fields):
    running = await field(*AGGREGATED)
    greedy = bodies(CHAT, temperature=0, max_tokens=40, **fields)
    sampled = bodies(CHAT, temperature=0.7, max_tokens=40, **fields)
    asked = [*greedy, *sampled]
    answers = await running.during(CHAT, asked, lambda: running.kill("aggregated-1"))
    expected = await texts(running, CHAT, asked)
    first, second = answers[:STREAMS], answers[STREAMS:]
    assert all(answer.whole for answer in first)
    assert [answer.text for answer in first] == expected[:STREAMS]
    broken = [answer for answer in second if not answer.whole]
    assert broken
    for answer, text in zip(second, expected[STREAMS:], strict=True):
        if answer.error is None:
            assert answer.whole
            continue
        # What was sent is the beginning of an answer, and nothing of it came twice.
        assert text.startswith(answer.text) and not answer.done
        assert "can't be resumed in the middle" in answer.error["message"]
        assert answer.error["code"].startswith("worker_")
    assert await running.metric('hpcserve_router_migrations_total{result="failed"') == len(broken)


async def test_stream_that_has_only_named_its_role_starts_again_unnoticed(field):
    """Also where it could not be resumed later: nothing was said yet."""
    running = await field(*AGGREGATED, flags=["--speech", "emoji"])
    # The stop string keeps the first words back; the role goes out at once.
    asked = bodies(CHAT, temperature=0.7, seed=3, max_tokens=60, stop=["x" * 40], tools=TOOLS)
    answers = [Answer() for _ in asked]
    tasks = [
        asyncio.create_task(running.stream(CHAT, body, answer))
        for body, answer in zip(asked, answers, strict=True)
    ]
    async with asyncio.timeout(DEADLINE):
        while not all(answer.roles for answer in answers):  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.005)
    assert not any(answer.text for answer in answers)
    running.kill("aggregated-1")
    await asyncio.gather(*tasks)
    assert all(answer.whole and answer.roles == 1 and len(answer.ids) == 1 for answer in answers)
    assert [answer.text for answer in answers] == await texts(running, CHAT, asked)
    assert await running.metric('hpcserve_router_migrations_total{result="restarted"') > 0


async def test_with_no_worker_left_the_stream_ends_with_an_error(field):
    running = await field("aggregated-0")
    asked = bodies(CHAT, temperature=0, max_tokens=60)[:3]
    answers = await running.during(CHAT, asked, lambda: running.kill("aggregated-0"))
    for answer in answers:
        assert answer.error is not None and not answer.done
        assert answer.error["message"].startswith("aggregated-0")
        assert "no other replica" in answer.error["message"]
    await running.router.idle()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_prompt_that_was_not_kept_is_tokenized_again(field, start, monkeypatch, path):
    """One process keeps the tokens of prompts up to some megabytes."""
    monkeypatch.setattr("hpcserve.router.runner._PROMPTS_MAX", 10)
    running = await field(*AGGREGATED)
    bench = await start(api_key=None, job_key=JOB_KEY, engine="fake")
    specs = [WorkerSpec(name=name, role="aggregated", url=running.engines[name].url) for name in AGGREGATED]
    bench.router.update(Table(state="ready", workers=tuple(specs)))
    running.router.port = bench.server.port
    asked = bodies(path, temperature=0, max_tokens=40)
    answers = await running.during(path, asked, lambda: running.kill("aggregated-1"))
    assert all(answer.whole for answer in answers), answers[0].raw[-300:]
    assert [answer.text for answer in answers] == await texts(running, path, asked)
    assert bench.metric('hpcserve_router_migrations_total{result="resumed",reason="reset"}') > 0
