"""The fake engine in TensorRT-LLM's dialect: a request's two halves, and what does not fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from .running import FakeEngine, wait_until

PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer"
CONTEXT = {"request_type": "context_only"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Pair:
    def __init__(self, folder: Path, *flags: str) -> None:
        def start(role: str) -> FakeEngine:
            more = () if role == "aggregated" else ("--side-channel-port", "0")
            return FakeEngine(folder / role, "--dialect", "tensorrt-llm", "--role", role, *more, *flags)

        self.prefill, self.decode, self.alone = map(start, ("prefill", "decode", "aggregated"))
        # All listen.
        assert self.prefill.url and self.decode.url and self.alone.url

    def context(self, body: dict[str, Any], path: str = COMPLETIONS) -> dict[str, Any]:
        return answer(self.prefill.post(path, {**body, "disaggregated_params": CONTEXT}))

    def held(self) -> int:
        return int(self.prefill.get("/fake/load").json()["held"])

    def stop(self) -> None:
        for engine in (self.prefill, self.decode, self.alone):
            engine.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    running = Pair(tmp_path)
    yield running
    running.stop()


def answer(response: requests.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def told(response: requests.Response) -> str:
    """Whatever is wrong is a 400, and the error's members are those of the body."""
    body = response.json()
    assert (response.status_code, body["object"], body["code"]) == (400, "error", 400)
    return str(body["message"])


def generation(body: dict[str, Any], first: dict[str, Any], **changed: Any) -> dict[str, Any]:
    params = {**first["choices"][0]["disaggregated_params"], "request_type": "generation_only", **changed}
    return {**body, "prompt": first["prompt_token_ids"], "disaggregated_params": params}


ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


def test_halves_answer_as_one_engine_does(pair: Pair) -> None:
    first = pair.context(ASK)
    choice = first["choices"][0]
    assert choice["finish_reason"] == "not_finished" and first["usage"]["completion_tokens"] == 1
    assert pair.held() == 1
    whole = answer(pair.decode.post(COMPLETIONS, generation(ASK, first)))
    alone = answer(pair.alone.post(COMPLETIONS, ASK))
    assert whole["choices"][0]["text"] == alone["choices"][0]["text"]
    assert whole["choices"][0]["text"].startswith(choice["text"])
    assert whole["usage"]["completion_tokens"] == 8
    wait_until(lambda: pair.held() == 0, "the blocks to be free")


def test_halves_of_a_chat(pair: Pair) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 5, "temperature": 0}
    first = pair.context(chat, CHAT)
    params = {**first["choices"][0]["disaggregated_params"], "request_type": "generation_only"}
    second = {**chat, "prompt_token_ids": first["prompt_token_ids"], "disaggregated_params": params}
    both = [answer(pair.decode.post(CHAT, second)), answer(pair.alone.post(CHAT, chat))]
    assert both[0]["choices"][0]["message"] == both[1]["choices"][0]["message"]


def test_the_first_token_is_the_context_servers(pair: Pair) -> None:
    """Each sampled with a seed of its own."""
    ask = {**ASK, "temperature": 1.0}
    for turn in range(4):
        first = pair.context({**ask, "prompt": f"{turn} {PROMPT}"})
        whole = answer(pair.decode.post(COMPLETIONS, generation(ask, first)))
        assert whole["choices"][0]["text"].startswith(first["choices"][0]["text"])


def test_one_token_ends_by_its_length_and_a_stop_token_keeps_no_blocks(pair: Pair) -> None:
    one = pair.context({**ASK, "max_tokens": 1})
    assert one["choices"][0]["finish_reason"] == "length"
    assert answer(pair.decode.post(COMPLETIONS, generation(ASK, one)))["choices"][0]["text"]
    wait_until(lambda: pair.held() == 0, "the blocks to be free")
    word = one["choices"][0]["text"]
    stopped = pair.context({**ASK, "stop": [word]})["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["disaggregated_params"]["encoded_opaque_state"] is None and pair.held() == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"encoded_opaque_state": "AAAA"},
        {"ctx_request_id": 7},
        {"first_gen_tokens": [1]},
        {"encoded_opaque_state": None},
    ],
)
def test_a_state_must_come_back_as_it_was(pair: Pair, changed: dict[str, Any]) -> None:
    first = pair.context(ASK)
    assert "opaque state" in told(pair.decode.post(COMPLETIONS, generation(ASK, first, **changed)))


def test_members_that_the_protocol_does_not_have_are_refused(pair: Pair) -> None:
    for more in ({"return_token_ids": True}, {"disaggregated_params": {**CONTEXT, "disagg_request_id": 1}}):
        assert "Extra inputs are not permitted" in told(pair.prefill.post(COMPLETIONS, {**ASK, **more}))


def test_an_engine_without_a_transfer_answers_no_halves(pair: Pair) -> None:
    said = told(pair.alone.post(COMPLETIONS, {**ASK, "disaggregated_params": CONTEXT}))
    assert said.startswith("Disaggregated serving is not enabled")


def test_kv_that_does_not_come_is_an_error_and_breaks_a_stream(pair: Pair) -> None:
    first = pair.context(ASK)
    pair.prefill.stop()
    second = generation(ASK, first)
    failure = "Error in kv cache transfer for generation requests"
    assert told(pair.decode.post(COMPLETIONS, second)) == failure
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        pair.decode.post(COMPLETIONS, {**second, "stream": True})
    # Alone it computes the prompt.
    assert answer(pair.decode.post(COMPLETIONS, ASK))["choices"][0]["text"]


def test_a_stream_has_no_nulls_and_counts_in_each_event(pair: Pair) -> None:
    ask = {**ASK, "stream": True, "stream_options": {}}
    events = pair.alone.post(COMPLETIONS, ask).text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all("usage" in chunk for chunk in chunks) and chunks[-1]["choices"] == []
    assert "finish_reason" not in chunks[0]["choices"][0]


def test_iterations_are_told_once(pair: Pair) -> None:
    pair.context(ASK)
    told_first = pair.prefill.get("/metrics").json()
    assert sum(each["inflightBatchingStats"]["numCtxTokens"] for each in told_first) > 1
    assert pair.prefill.get("/metrics").json() == []
