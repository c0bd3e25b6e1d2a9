"""Which answers another engine can go on with, and what it is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hpcserve.engines import resuming

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x", "stream": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["a"], "min_tokens": 4, "logit_bias": {"5": 1}},
        {
            "n": 1,
            "logprobs": False,
            "tools": None,
            "response_format": {"type": "text"},
            "presence_penalty": 0,
        },
        {"repetition_penalty": 1.2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ],
)
def test_text_from_the_prompt_alone_can_be_resumed(fields: dict[str, Any]) -> None:
    assert resuming.obstacle({**CHAT, **fields}) is None


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({**CHAT, "n": 2}, "n"),
        ({**CHAT, "tools": [{}]}, "tools"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({**CHAT, "logprobs": True}, "logprobs"),
        ({**COMPLETION, "logprobs": 0}, "logprobs"),
        ({**CHAT, "frequency_penalty": -1}, "frequency_penalty"),
        ({**COMPLETION, "echo": True}, "echo"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ],
)
def test_state_beyond_the_tokens_is_an_obstacle(body: dict[str, Any], name: str) -> None:
    assert name in str(resuming.obstacle(body))


def test_rest_of_an_answer_is_asked_for_with_the_same_sampling() -> None:
    body = {
        **CHAT, "temperature": 0, "max_completion_tokens": 50, "min_tokens": 12, "stop": "x",
        "chat_template_kwargs": {"a": 1}, "stream_options": {"include_usage": False},
    }  # fmt: skip
    prompt = msgspec.Raw(b"[1,2,3,4]")
    request = resuming.resume(body, prompt, generated=2, max_tokens=48)
    assert msgspec.json.decode(msgspec.json.encode(request)) == {
        "model": "m", "prompt": [1, 2, 3, 4], "temperature": 0, "stop": "x", "max_tokens": 48,
        "min_tokens": 10, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }  # fmt: skip
    assert "min_tokens" not in resuming.resume(body, prompt, generated=12, max_tokens=38)


def test_budget_is_the_clients_or_vllms_own() -> None:
    assert resuming.budget(CHAT) is None
    assert resuming.budget({**CHAT, "max_tokens": 9, "max_completion_tokens": 7}) == 7
    assert resuming.budget(COMPLETION) == resuming.budget({**COMPLETION, "max_tokens": None}) == 16


def test_prompt_is_tokenized_as_the_route_would() -> None:
    asked = resuming.tokenize({**CHAT, "continue_final_message": True, "temperature": 1})
    assert asked == {"model": "m", "messages": CHAT["messages"], "continue_final_message": True}
    assert resuming.tokenize({**COMPLETION, "add_special_tokens": False, "user": "u"}) == {
        "model": "m", "prompt": "x", "add_special_tokens": False,
    }  # fmt: skip
    assert resuming.tokenize({**CHAT, "reasoning_effort": "low"}) is None
    assert resuming.tokenize({**COMPLETION, "prompt": ["a", "b"]}) is None
