"""Streams of engines that speak SGLang's dialect, whose worker is killed: completions go on from their
tokens, chats are run again where that gives the same text, and all else ends with an error event."""

from __future__ import annotations

import pytest

from tests.router.conftest import start

from .field import Field
from .test_cuts import AGGREGATED, CHAT, COMPLETIONS, PAIRS, bodies, texts

__all__ = ["start"]

RESUMED = 'hpcserve_router_migrations_total{result="resumed"'
REPLAYED = 'hpcserve_router_migrations_total{result="replayed"'
FAILED = 'hpcserve_router_migrations_total{result="failed"'


@pytest.mark.parametrize("engines", [AGGREGATED, PAIRS], ids=["aggregated", "a pair in a room"])
@pytest.mark.parametrize("interval", ["1", "3"])
async def test_completions_go_on_from_their_tokens(field, engines, interval):
    """Half of them are sampled: the toy model's text depends on its seed and on nothing that is lost."""
    running: Field = await field(
        *engines, engine="sglang", flags=["--speech", "emoji", "--stream-interval", interval]
    )
    usage = {"include_usage": True}
    asked = bodies(COMPLETIONS, temperature=0, max_tokens=50, stream_options=usage)
    for i, body in enumerate(asked[::2]):
        body |= {"temperature": 1, "seed": i, "min_tokens": 40, "max_tokens": 51}
    answers = await running.during(COMPLETIONS, asked, lambda: running.kill(engines[-1]))
    assert all(answer.whole for answer in answers), [answer.error for answer in answers]
    assert [answer.text for answer in answers] == await texts(running, COMPLETIONS, asked)
    assert [(answer.usage or {})["completion_tokens"] for answer in answers] == [
        body["max_tokens"] for body in asked
    ]
    # The client asked for no ids, and every event is under the stream's own id.
    assert not any(answer.token_ids for answer in answers) and all(len(answer.ids) == 1 for answer in answers)
    assert await running.metric(RESUMED) == len(asked) / 2
    await running.until_idle()


async def test_ids_that_a_client_asks_for_are_those_of_one_engine(field):
    running: Field = await field(*PAIRS, engine="sglang")
    asked = bodies(COMPLETIONS, temperature=0, max_tokens=40, return_token_ids=True)
    answers = await running.during(COMPLETIONS, asked, lambda: running.kill(PAIRS[-1]))
    for answer, body in zip(answers, asked, strict=True):
        expected = (await running.expected(COMPLETIONS, body))["choices"][0]
        assert (answer.text, answer.token_ids) == (expected["text"], expected["token_ids"])


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_stop_string_that_may_have_begun_is_not_cut(field, temperature):
    """SGLang writes the beginning of a stop string, and would not know it in what comes after a cut."""
    running: Field = await field(*AGGREGATED, engine="sglang")
    plain = bodies(COMPLETIONS, temperature=temperature, seed=7, max_tokens=60)
    whole = await texts(running, COMPLETIONS, plain)
    # Of a stop string this long, a beginning is the end of nearly every text.
    asked = [
        {**body, "stop": [text[3 * (4 + i) : 3 * (4 + i) + 90]]}
        for i, (body, text) in enumerate(zip(plain, whole, strict=True))
    ]
    expected = await texts(running, COMPLETIONS, asked)
    answers = await running.during(
        COMPLETIONS, asked, lambda: running.kill(AGGREGATED[1]), tokens=16, hold=20
    )
    assert not any(answer.done and answer.error is None and not answer.finish for answer in answers)
    for answer, text in zip(answers, expected, strict=True):
        if answer.error is None:
            # What had begun to be a stop string was written before it was known to be one.
            assert answer.finish == {0: "stop"} and answer.text.startswith(text)
        else:
            assert temperature and "beginning of a stop string" in answer.error["message"]
    assert await running.metric(FAILED if temperature else REPLAYED) > 0


async def test_greedy_chats_run_again_and_others_end_with_an_error(field):
    running: Field = await field(*PAIRS, engine="sglang")
    asked = bodies(CHAT, temperature=0, max_tokens=40)
    for body in asked[::3]:
        body |= {"temperature": 1, "seed": 3}
    answers = await running.during(CHAT, asked, lambda: running.kill(PAIRS[-1]))
    expected = await texts(running, CHAT, asked)
    broken = 0
    for body, answer, text in zip(asked, answers, expected, strict=True):
        if answer.error is None:
            assert answer.text == text and answer.roles == 1 and answer.finish == {0: "length"}
        else:
            broken += 1
            assert body["temperature"] == 1 and text.startswith(answer.text)
            assert "a chat, whose tokens SGLang does not name" in answer.error["message"]
    assert broken == await running.metric(FAILED) > 0
    assert await running.metric(REPLAYED) > 0
    await running.until_idle()
