"""The router process before fake engines that speak TensorRT-LLM's dialect, 2 prefill and 2 decode.

They take no member that TensorRT-LLM's protocol does not have, and their state must come back unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from hpcserve import engines
from hpcserve.node.calls import Calls
from hpcserve.node.head.kv_proof import Prover, Target
from tests.fake_engine.running import wait_until

from . import fleet as fleets
from .fleet import JOB_KEY, NAMES, PROMPT, check_killed_decode, streamed
from .test_process import KEY


class Fleet(fleets.Fleet):
    dialect = "tensorrt-llm"

    def flags(self, name: str) -> list[str]:
        return ["--side-channel-port", "0"]

    def metric(self, line: str) -> float:
        """Of the router."""
        key = {"authorization": f"Bearer {KEY}"}
        text = requests.get(f"{self.url}/metrics", headers=key, timeout=30).text
        found = [each for each in text.splitlines() if each.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def free(self, *names: str) -> None:
        """Nothing runs, and nothing is kept for decode."""
        idle = {"unfinished": 0, "held": 0}
        for name in names:
            engine = self.engines[name]
            wait_until(lambda e=engine: e.get("/fake/load").json() == idle, f"{name} to be free")  # type: ignore[misc]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def ours(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(fleet.url) as client:
        yield client


@pytest.fixture
def alone(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(fleet.alone.url) as client:
        yield client


def whole(client: openai.OpenAI, prompt: str, **fields: Any) -> Any:
    asked = {"model": "toy", "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    return client.completions.create(**asked)


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.choices[0].text)


TRANSFERRED = 'hpcserve_router_kv_legs_total{result="transferred"}'
ENDED = 'hpcserve_router_kv_legs_total{result="none"}'


def test_answers_equal_those_of_one_engine_and_their_state_came_back_unchanged(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    for i in range(4):
        both = [whole(client, f"{i} {PROMPT}") for client in (ours, alone)]
        assert both[0].choices[0].text == both[1].choices[0].text
        assert both[0].usage == both[1].usage or both[0].usage.completion_tokens == 12
        assert streamed(ours, f"{i} {PROMPT}") == streamed(alone, f"{i} {PROMPT}")
    # A decode engine recomputes nothing: that it answered means that all KV came, and the state with it.
    assert fleet.metric(TRANSFERRED) == 8
    fleet.free(*NAMES)


def test_chats_and_their_choices_are_those_of_one_engine(ours: openai.OpenAI, alone: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "toy", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "n": 3, "seed": 3,
    }  # fmt: skip
    answers = [client.chat.completions.create(**asked) for client in (ours, alone)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    streams = []
    for client in (ours, alone):
        said = ["", "", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        streams.append(said)
    assert streams[0] == streams[1] == texts[0]


def test_usage_is_told_to_who_asks_and_counted_for_who_does_not(fleet: Fleet, ours: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "toy", "prompt": PROMPT, "max_tokens": 5, "stream": True}
    assert all(chunk.usage is None for chunk in ours.completions.create(**asked))
    options = {"include_usage": True, "continuous_usage_stats": False}
    *_, last = ours.completions.create(**asked, stream_options=options)
    assert last.usage is not None and last.usage.completion_tokens == 5


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_an_answer_that_ends_with_its_first_token_comes_from_prefill(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI, path: str
) -> None:
    def ask(client: openai.OpenAI, **more: Any) -> Any:
        common: dict[str, Any] = {"model": "toy", "temperature": 0, **more}
        if path == "chat":
            messages: Any = [{"role": "user", "content": PROMPT}]
            return client.chat.completions.create(messages=messages, **common)
        return client.completions.create(prompt=PROMPT, **common)

    def said(choice: Any) -> str:
        return str(choice.message.content if path == "chat" else choice.text)

    first = said(ask(alone, max_tokens=1).choices[0])
    stop: dict[str, Any] = {"stop": [first], "include_stop_str_in_output": True}
    asked = {"max_tokens": 20, "extra_body": stop}
    answers = [ask(client, **asked) for client in (ours, alone)]
    assert [said(each.choices[0]) for each in answers] == [first, first]
    assert [each.choices[0].finish_reason for each in answers] == ["stop", "stop"]
    assert answers[0].usage.completion_tokens == 1
    assert "disaggregated_params" not in str(answers[0].choices[0].model_dump(exclude_none=True))
    # As a stream, and as one that is joined from two.
    for n in (1, 2):
        heard, reasons = "", []
        for chunk in ask(ours, **asked, stream=True, n=n, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                heard += (choice.delta.content or "") if path == "chat" else choice.text
                reasons += [choice.finish_reason] if choice.finish_reason else []
            usage = chunk.usage
        assert (heard, reasons) == (first * n, ["stop"] * n)
        assert usage is not None and usage.completion_tokens == n
    assert fleet.metric(ENDED) == 4 and fleet.metric(TRANSFERRED) == 0
    fleet.free(*NAMES)


def test_client_that_leaves_frees_both_engines(fleet: Fleet, ours: openai.OpenAI) -> None:
    stream = ours.completions.create(model="toy", prompt=PROMPT, max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    fleet.free(*NAMES)


@pytest.mark.parametrize("ask", [whole, streamed])
def test_kv_that_does_not_come_costs_another_prefill_and_then_a_local_one(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI, ask: Callable[..., Any]
) -> None:
    """Decode's 400 is told by its words from one that is the client's; its stream breaks off at once."""
    local = 'hpcserve_router_kv_legs_total{result="local",reason="kv_failed"}'
    expected = [text(ask(alone, f"{i} {PROMPT}")) for i in range(2)]
    fleet.engines["decode-0"].fail("drop_transfer", count=1)
    fleet.engines["decode-1"].fail("drop_transfer", count=1)
    # One, the other, and the first again, which computes the prompt.
    assert text(ask(ours, f"0 {PROMPT}")) == expected[0]
    assert fleet.metric(local) == 1 and fleet.metric(TRANSFERRED) == 2
    fleet.engines["decode-1"].stop()
    fleet.launch("decode-1")
    fleet.announce("prefill-0", "decode-1")
    fleet.engines["decode-1"].fail("drop_transfer", count=1)
    assert text(ask(ours, f"1 {PROMPT}")) == expected[1]
    assert fleet.metric(local) == 2
    fleet.free("decode-0", "decode-1")


def test_prefill_that_was_killed_costs_no_answer(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    fleet.engines["prefill-0"].stop()
    for i in range(4):
        assert streamed(ours, f"{i} {PROMPT}") == streamed(alone, f"{i} {PROMPT}")
    fleet.free("prefill-1", "decode-0", "decode-1")


def test_a_refusal_stays_the_clients(fleet: Fleet, ours: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Extra inputs are not permitted"):
        ours.completions.create(model="toy", prompt=PROMPT, extra_body={"vllm_thing": 1})
    with pytest.raises(openai.BadRequestError, match="disaggregated_params"):
        ours.completions.create(
            model="toy", prompt=PROMPT, extra_body={"disaggregated_params": {"request_type": "context_only"}}
        )
    for name in NAMES:
        assert whole(ours, f"{name} {PROMPT}").choices[0].text


def test_decode_killed_mid_stream_ends_the_stream_with_an_error_and_others_go_on(
    fleet: Fleet, ours: openai.OpenAI
) -> None:
    check_killed_decode(fleet, ours)


def test_a_restarted_prefill_is_used_again(fleet: Fleet, ours: openai.OpenAI) -> None:
    fleet.engines["prefill-0"].stop()
    fleet.launch("prefill-0")
    fleet.announce("prefill-0", "decode-0")
    assert streamed(ours, PROMPT)
    assert fleet.metric(TRANSFERRED) == 1


def test_without_a_prefill_engine_decode_computes_the_prompt(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    fleet.announce("decode-0", "decode-1")
    answer = ours.completions.with_raw_response.create(
        model="toy", prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert "no prefill replica is in rotation" in answer.headers["x-hpcserve-warning"]
    assert answer.parse().choices[0].text == whole(alone, PROMPT).choices[0].text


def test_probabilities_are_told_by_one_engine(fleet: Fleet, ours: openai.OpenAI) -> None:
    answer = ours.completions.with_raw_response.create(model="toy", prompt=PROMPT, max_tokens=3, logprobs=1)
    assert "stay on the prefill replica" in answer.headers["x-hpcserve-warning"]
    assert len(answer.parse().choices[0].logprobs.tokens) == 3  # type: ignore[union-attr, arg-type]
    assert fleet.metric(TRANSFERRED) == 0


def test_the_head_proves_a_pair_by_its_answer(fleet: Fleet) -> None:
    def target(name: str) -> Target:
        return Target(name=name, replica=name, url=fleet.engines[name].url, generation=1, machine=name)

    async def prove() -> None:
        calls = Calls(JOB_KEY)
        prover = Prover(engines.get("tensorrt-llm"), calls, served_name="toy", max_model_len=None)
        good = await prover.pair(target("prefill-0"), target("decode-0"))
        assert good.error is None and good.bytes is None
        await asyncio.to_thread(fleet.engines["decode-0"].fail, "drop_transfer", count=1)
        bad = await prover.pair(target("prefill-0"), target("decode-0"))
        assert bad.error is not None and "no KV cache passes from prefill-0 to decode-0" in bad.error.message
        await calls.close()

    asyncio.run(prove())
