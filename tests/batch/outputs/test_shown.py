"""What a table shows of the answers of each route."""

from __future__ import annotations

import base64
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.batch.outputs.shown import shown

from .made import answered, chat, embedding, failed


def test_a_chat_shows_text_reasoning_reason_and_usage() -> None:
    cells = shown(answered(0, chat("42", reasoning="because")))
    assert (cells.response, cells.reasoning, cells.finish_reason) == ("42", "because", "stop")
    assert cells.usage == {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 4}
    assert cells.error is None
    assert shown(answered(0, chat("42", reasoning_content="old name"))).reasoning == "old name"


def test_a_completion_shows_its_text() -> None:
    body = {"choices": [{"text": " there", "finish_reason": "length"}]}
    cells = shown(answered(0, body))
    assert (cells.response, cells.finish_reason, cells.usage) == (" there", "length", None)


def test_tool_calls_without_text_are_not_lost() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert json.loads(str(shown(answered(0, chat(None, tool_calls=calls))).response)) == calls
    assert shown(answered(0, chat("said", tool_calls=calls))).response == "said"
    assert shown(answered(0, chat(None, refusal="no"))).response == "no"
    assert shown(answered(0, chat(""))).response == ""


def test_several_choices_of_one_request_are_all_shown() -> None:
    body = chat("one")
    body["choices"] += chat("two")["choices"]
    assert shown(answered(0, body)).response == '["one","two"]'


def test_an_embedding_is_a_vector_in_floats_or_base64() -> None:
    vector = array("f", [0.5, -1.25])
    assert shown(answered(0, embedding([0.5, -1.25]))).response == vector
    encoded = base64.b64encode(vector.tobytes()).decode()
    assert shown(answered(0, embedding(encoded))).response == vector
    assert json.loads(str(shown(answered(0, embedding([1.0], [2.0]))).response))[1]["embedding"] == [2.0]


def test_scores_and_ranks_are_json() -> None:
    scores = {"data": [{"index": 0, "score": 0.5}]}
    assert json.loads(str(shown(answered(0, scores)).response)) == scores["data"]
    ranks = {"results": [{"index": 1, "relevance_score": 0.9}]}
    assert json.loads(str(shown(answered(0, ranks)).response)) == ranks["results"]
    assert shown(answered(0, [1, 2])).response == "[1,2]"


def test_an_answer_of_the_responses_api() -> None:
    output = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "yes"}]},
    ]
    usage = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}
    cells = shown(answered(0, {"output": output, "status": "completed", "usage": usage}))
    assert (cells.response, cells.reasoning, cells.finish_reason) == ("yes", "hm", "completed")
    assert cells.usage == {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1}


def test_a_failure_shows_its_code_and_message_only() -> None:
    cells = shown(failed())
    assert cells.error == "engine_died: three times"
    assert cells.response is None
    assert shown(answered(0, {"message": "no"}, status=422)).error == "http_422: no"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "data", "embedding", "usage", "output", "text"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(body=json_values)
def test_no_body_is_a_crash_or_shows_nothing(body: Any) -> None:
    cells = shown(answered(0, body if body is not None else b"null"))
    assert cells.error is None


@pytest.mark.parametrize("count", [True, -1, "3", 1 << 70])
def test_a_count_that_is_none_is_null(count: Any) -> None:
    body = chat() | {"usage": {"prompt_tokens": count, "completion_tokens": 1}}
    usage = shown(answered(0, body)).usage
    assert usage == {"prompt_tokens": None, "completion_tokens": 1, "cached_tokens": None}
