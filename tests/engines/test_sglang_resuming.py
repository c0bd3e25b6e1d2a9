"""Which of SGLang's answers another engine can go on with, and what it is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hpcserve import engines

SGLANG = engines.get("sglang")
BODY: dict[str, Any] = {"model": "m", "prompt": "x", "stream": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["ab"],
            "min_tokens": 4,
            "logit_bias": {"5": 1},
        },
        {"n": 1, "presence_penalty": 0, "repetition_penalty": 1.0, "response_format": {"type": "text"}},
    ],
)
def test_text_from_the_prompt_alone_can_be_resumed(fields: dict[str, Any]) -> None:
    assert SGLANG.resume_obstacle({**BODY, **fields}, "some text") is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 2}, "`n`"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty`"),
        ({"frequency_penalty": -1}, "`frequency_penalty`"),
        ({"regex": "a+"}, "`regex`"),
        ({"response_format": {"type": "json_object"}}, "`response_format`"),
        ({"logprobs": 0}, "`logprobs`"),
        ({"echo": True}, "`echo`"),
        ({"suffix": "y"}, "`suffix`"),
        ({"stop": "x", "no_stop_trim": True}, "`no_stop_trim`"),
        ({"messages": []}, "a chat"),
    ],
)
def test_state_beyond_the_tokens_is_an_obstacle(fields: dict[str, Any], name: str) -> None:
    assert name in str(SGLANG.resume_obstacle({**BODY, **fields}, ""))


@pytest.mark.parametrize(
    ("sent", "begun"), [("an en", True), ("an e", True), ("an end", False), ("a", False)]
)
def test_the_beginning_of_a_stop_string_is_one(sent: str, begun: bool) -> None:
    assert (SGLANG.resume_obstacle({**BODY, "stop": ["end"]}, sent) is not None) == begun


def test_only_streams_of_completions_name_their_tokens() -> None:
    assert SGLANG.names_tokens(chat=False) and not SGLANG.names_tokens(chat=True)
    assert engines.get("vllm").names_tokens(chat=True)
    assert not engines.get("tensorrt-llm").names_tokens(chat=False)


def test_rest_of_an_answer_is_asked_for_with_the_same_sampling() -> None:
    body = {
        **BODY,
        "temperature": 0,
        "min_tokens": 12,
        "stop": "x",
        "stream_options": {"include_usage": False},
    }
    assert SGLANG.answer_budget(body) == 16 and SGLANG.answer_budget({**body, "max_tokens": 50}) == 50
    prompt = msgspec.Raw(b"[1,2,3,4]")
    request = SGLANG.resume_request(body, prompt, generated=2, max_tokens=14)
    assert msgspec.json.decode(msgspec.json.encode(request)) == {
        "model": "m", "prompt": [1, 2, 3, 4], "suffix": "", "temperature": 0, "min_tokens": 10, "stop": "x",
        "max_tokens": 14, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
    }  # fmt: skip
    assert SGLANG.tokenize_request(body) == {"model": "m", "prompt": "x"}
    assert SGLANG.tokenize_request({"prompt": [1, 2]}) is None
