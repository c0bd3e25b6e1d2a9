"""TensorRT-LLM's two legs: the context first, then the generation."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest

from hpcserve import engines

ENGINE = engines.get("tensorrt-llm")
PARAMS = {
    "request_type": "context_only", "first_gen_tokens": [17], "ctx_request_id": 2**63 - 1,
    "encoded_opaque_state": "b3BhcXVl", "draft_tokens": None, "of the future": [None],
}  # fmt: skip
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def response(reason: str | None = "not_finished", **choice: Any) -> dict[str, Any]:
    """A context server's answer, of a completion unless the choice has a `message`."""
    entry = {
        "index": 0,
        "finish_reason": reason,
        "stop_reason": None,
        "disaggregated_params": PARAMS,
        **choice,
    }
    if "message" not in entry:
        entry["text"] = " a"
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m", "choices": [entry],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
        "prompt_token_ids": [5, 6, 7],
    }  # fmt: skip


def test_prefill_is_the_whole_request_as_context_only() -> None:
    body = {
        **CHAT, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 100, "min_tokens": 2,
        "temperature": 0.5, "tools": [{"type": "function"}], "stop": ["x"],
    }  # fmt: skip
    before = copy.deepcopy(body)
    leg = ENGINE.prefill_request(body)
    assert body == before
    assert leg == {
        **CHAT, "stream": False, "max_tokens": 100, "min_tokens": 2, "temperature": 0.5,
        "tools": [{"type": "function"}], "stop": ["x"],
        "disaggregated_params": {"request_type": "context_only"},
    }  # fmt: skip


@pytest.mark.parametrize("asked", [True, 3, msgspec.Raw(b"true"), msgspec.Raw(b"1")])
def test_probabilities_have_no_prefill_leg(asked: Any) -> None:
    with pytest.raises(ValueError, match="stay on the prefill replica"):
        ENGINE.prefill_request({**CHAT, "logprobs": asked})


@pytest.mark.parametrize("asked", [False, None, 0, msgspec.Raw(b"false"), msgspec.Raw(b"null")])
def test_a_request_without_probabilities_has_one(asked: Any) -> None:
    assert ENGINE.prefill_request({**CHAT, "logprobs": asked})["stream"] is False


def test_decode_gets_the_params_unread_and_the_prompt_as_tokens() -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 7}
    leg = ENGINE.decode_request(body, response())
    params = {**PARAMS, "request_type": "generation_only"}
    assert leg == {**body, "prompt": [5, 6, 7], "disaggregated_params": params}
    assert PARAMS["request_type"] == "context_only" and "disaggregated_params" not in body
    chat = ENGINE.decode_request(CHAT, response("length"))
    assert chat == {**CHAT, "prompt_token_ids": [5, 6, 7], "disaggregated_params": params}
    # A number of 64 bits survives its way through the router.
    assert json.loads(msgspec.json.encode(chat))["disaggregated_params"]["ctx_request_id"] == 2**63 - 1


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [1]},
        {"choices": [{"finish_reason": "not_finished"}]},
        response("stop"),
        response(None),
        response(disaggregated_params=None),
    ],
)
def test_decode_without_kept_blocks_is_a_key_error(answer: dict[str, Any]) -> None:
    with pytest.raises(KeyError):
        ENGINE.decode_request(CHAT, answer)


@pytest.mark.parametrize("reason", ["not_finished", "length", None])
def test_an_answer_that_goes_on_is_none_yet(reason: str | None) -> None:
    assert ENGINE.early_answer(response(reason), stream=False) is None


def test_an_answer_that_ended_is_the_clients_without_what_is_for_decode() -> None:
    ended = response("stop", stop_reason="x")
    answer = ENGINE.early_answer(ended, stream=False)
    assert answer is not None
    choice = {**ended["choices"][0], "disaggregated_params": None}
    assert json.loads(answer) == {**ended, "choices": [choice], "prompt_token_ids": None}


def events(answer: bytes | None) -> list[dict[str, Any]]:
    assert answer is not None and answer.endswith(b"data: [DONE]\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in answer.split(b"\n\n")[:-2]]


def test_an_answer_that_ended_as_a_stream() -> None:
    head = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m"}
    last = {**head, "choices": [], "usage": response()["usage"]}
    text = {"index": 0, "text": " a", "finish_reason": "stop", "stop_reason": None}
    assert events(ENGINE.early_answer(response("stop"), stream=True)) == [{**head, "choices": [text]}, last]
    said = {"role": "assistant", "content": "a", "reasoning": None, "tool_calls": []}
    head["object"] = "chat.completion.chunk"
    first, second, _ = events(ENGINE.early_answer(response("stop", message=said), stream=True))
    delta = {"role": "assistant", "content": "a"}
    assert first == {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = {"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": None}
    assert second == {**head, "choices": [end]}


def test_a_failed_transfer_is_told_from_a_wrong_request() -> None:
    failed = b'{"object":"error","message":"Error in kv cache transfer for generation requests","code":400}'
    assert ENGINE.transfer_failed(400, failed)
    assert not ENGINE.transfer_failed(400, b'{"object":"error","message":"max_tokens","code":400}')
    assert not ENGINE.transfer_failed(200, failed)
    assert not ENGINE.recomputes and engines.get("vllm").recomputes
    assert not engines.get("vllm").transfer_failed(400, failed)


def test_no_client_may_say_where_decode_connects_to() -> None:
    assert ENGINE.router_members == ("disaggregated_params",)


def test_bytes_are_not_told() -> None:
    assert ENGINE.kv_bytes_received("[]") is None
