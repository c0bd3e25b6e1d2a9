"""Bodies in SGLang's dialect have the fields that SGLang 0.5.23 wrote when it was asked the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .running import FakeEngine
from .test_shapes import MESSAGES, events

COMPLETION = {"id", "object", "created", "model", "choices", "usage"}
CHOICE = {"index", "text", "logprobs", "finish_reason", "matched_stop"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(tmp_path / "sglang", "--dialect", "sglang")
    yield engine
    engine.stop()


def test_streamed_completion(sglang: FakeEngine) -> None:
    body = {"prompt": "hello", "max_tokens": 3}
    for chunk in events(sglang, "/v1/completions", body):
        assert set(chunk) == COMPLETION and set(chunk["choices"][0]) == CHOICE
    first, *others = events(sglang, "/v1/completions", {**body, "return_token_ids": True})
    assert set(first["choices"][0]) == CHOICE | {"token_ids", "prompt_token_ids"}
    assert all(set(chunk["choices"][0]) == CHOICE | {"token_ids"} for chunk in others)


def test_streamed_chat_ends_with_an_event_of_its_own(sglang: FakeEngine) -> None:
    chunks = events(sglang, CHAT, {"messages": MESSAGES, "max_tokens": 2})
    assert all(set(chunk) == COMPLETION - {"usage"} for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(set(choice) == CHOICE - {"text"} | {"delta"} for choice in choices)
    assert choices[0]["delta"] == {"reasoning_content": None, "role": "assistant", "content": ""}
    assert [set(choice["delta"]) for choice in choices[1:-1]] == [{"reasoning_content", "content"}] * 2
    assert choices[-1]["delta"] == {"reasoning_content": None}
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]


def test_chats_that_stream_name_no_tokens(sglang: FakeEngine) -> None:
    refused = sglang.post(CHAT, {"messages": MESSAGES, "stream": True, "return_token_ids": True})
    assert refused.status_code == 400 and refused.json()["type"] == "BadRequest"
    assert "not supported with streaming" in refused.json()["message"]


def test_the_beginning_of_a_stop_string_is_written(sglang: FakeEngine) -> None:
    text = sglang.complete("hello", max_tokens=12, temperature=0)["choices"][0]["text"]
    stop = text[7:20]
    asked = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "stop": stop}
    choices = [chunk["choices"][0] for chunk in events(sglang, "/v1/completions", asked)]
    written = "".join(choice["text"] for choice in choices)
    assert text.startswith(written) and len(written) > 7
    assert (choices[-1]["finish_reason"], choices[-1]["matched_stop"]) == ("stop", stop)
    # An answer in one piece is cut before it.
    whole = sglang.post("/v1/completions", asked).json()
    assert whole["choices"][0]["text"] == text[:7]
    assert set(whole) == COMPLETION | {"metadata"} and set(whole["choices"][0]) == CHOICE


def test_text_to_tokens_and_back(sglang: FakeEngine) -> None:
    found = sglang.post("/tokenize", {"prompt": "hello there"}).json()
    assert set(found) == {"tokens", "count", "max_model_len"} and found["count"] == len(found["tokens"])
    assert sglang.post("/detokenize", {"tokens": found["tokens"]}).json() == {"text": "hello there"}
