"""The two legs of a request, the same for vLLM and the fake engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hpcserve import engines
from hpcserve.engines.base import Engine

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "tp_size": 2, "of the future": [None]}


@pytest.fixture(params=["vllm", "fake"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return engines.get(request.param)


def test_prefill_computes_the_prompt_and_one_token(engine: Engine) -> None:
    body: dict[str, Any] = {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True,
        "stream_options": {"include_usage": True}, "max_tokens": 100, "max_completion_tokens": 90,
        "n": 3, "temperature": 0.5, "tools": [{"type": "function"}],
    }  # fmt: skip
    before = copy.deepcopy(body)
    leg = engine.prefill_request(body)
    assert body == before
    assert leg == {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "stream": False,
        "max_tokens": 1, "max_completion_tokens": 1, "n": 1, "temperature": 0.5,
        "tools": [{"type": "function"}],
        "kv_transfer_params": {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
            "remote_block_ids": None, "remote_host": None, "remote_port": None,
        },
    }  # fmt: skip


def test_prefill_adds_no_limit_the_client_did_not_use(engine: Engine) -> None:
    assert "max_completion_tokens" not in engine.prefill_request({"prompt": [1, 2, 3]})


# Why each: the comments of nixl_protocol.py, with the files of vLLM.
DROPPED = {
    "stream_options": {"include_usage": True},
    "min_tokens": 2,
    "best_of": 3,
    "structured_outputs": {"regex": "a+"},
    "logprobs": True,
    "top_logprobs": 5,
    "logprob_token_ids": [1],
    "echo": True,
    "return_token_ids": True,
}
KEPT = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "documents": [{"title": "t", "text": "x"}],
    "reasoning_effort": "low",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "truncation_side": "left",
    "mm_processor_kwargs": {"x": 1},
    "prompt_embeds": "AA==",
    "cache_salt": "s",
    "stop": ["a"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "logit_bias": {"5": 1},
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "thinking_token_budget": 5,
    "temperature": 0.5,
    "seed": 3,
    "priority": 1,
    "session_id": "c",
    "user": "u",
}


@pytest.mark.parametrize("key", DROPPED)
def test_prefill_goes_without_what_would_refuse_or_burden_it(engine: Engine, key: str) -> None:
    body = {"messages": [], key: DROPPED[key]}
    assert key not in engine.prefill_request(body)
    assert engine.decode_request(body, {"kv_transfer_params": PARAMS})[key] == DROPPED[key]


@pytest.mark.parametrize("key", KEPT)
def test_prefill_keeps_what_makes_the_prompt_or_can_not_hurt(engine: Engine, key: str) -> None:
    assert engine.prefill_request({"messages": [], key: KEPT[key]})[key] == KEPT[key]


def test_decode_carries_the_params_verbatim(engine: Engine) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 7}
    leg = engine.decode_request(body, {"choices": [], "kv_transfer_params": PARAMS})
    assert leg == {**body, "kv_transfer_params": PARAMS}
    assert leg["kv_transfer_params"] is PARAMS
    assert "kv_transfer_params" not in body


@pytest.mark.parametrize("response", [{}, {"kv_transfer_params": None}, {"kv_transfer_params": {}}])
def test_decode_without_kept_blocks_is_a_key_error(engine: Engine, response: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="kv_transfer_params"):
        engine.decode_request({"prompt": "x"}, response)


def test_bytes_are_summed_over_data_parallel_ranks(engine: Engine) -> None:
    metrics = (
        "# TYPE vllm:nixl_bytes_transferred histogram\n"
        'vllm:nixl_bytes_transferred_bucket{engine="0",le="2048.0",model_name="m"} 1.0\n'
        'vllm:nixl_bytes_transferred_sum{engine="0",model_name="a b"} 524288.0\n'
        'vllm:nixl_bytes_transferred_sum{engine="1",model_name="a b"} 1.5e+06\n'
    )
    assert engine.kv_bytes_received(metrics) == 2024288.0


def test_bytes_are_unknown_without_the_metric(engine: Engine) -> None:
    assert engine.kv_bytes_received("vllm:num_requests_running 0\n") is None
