"""Bodies have the fields of vLLM 0.32's response models (recorded from its protocol modules)."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from .running import FakeEngine

MESSAGES = [{"role": "user", "content": "say something"}]
USAGE = {
    "prompt_tokens",
    "total_tokens",
    "completion_tokens",
    "prompt_tokens_details",
    "completion_tokens_details",
}
COMPLETION = {
    "id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage",
    "kv_transfer_params", "ec_transfer_params", "metrics",
}  # fmt: skip
COMPLETION_CHOICE = {
    "index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_logprobs",
    "prompt_token_ids", "routed_experts",
}  # fmt: skip
CHAT = COMPLETION | {"prompt_logprobs", "prompt_token_ids", "prompt_text"}
CHAT_CHOICE = {"index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"}
MESSAGE = {"role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"}


def events(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoded events of a stream, which must end with [DONE]."""
    response = engine.post(path, {**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_completion(engine: FakeEngine) -> None:
    body = engine.complete("hello", max_tokens=3)
    assert set(body) == COMPLETION
    assert set(body["choices"][0]) == COMPLETION_CHOICE
    assert set(body["usage"]) == USAGE
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["usage"]["completion_tokens"] == 3
    assert body["choices"][0]["finish_reason"] == "length"


def test_chat(engine: FakeEngine) -> None:
    body = engine.post("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 3}).json()
    assert set(body) == CHAT
    assert set(body["choices"][0]) == CHAT_CHOICE
    assert set(body["choices"][0]["message"]) == MESSAGE
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["usage"]["completion_tokens"] == 3


def test_streamed_completion(engine: FakeEngine) -> None:
    options = {"include_usage": True}
    chunks = events(engine, "/v1/completions", {"prompt": "x", "max_tokens": 2, "stream_options": options})
    *tokens, last = chunks
    assert [set(chunk) for chunk in tokens] == [{"id", "object", "created", "model", "choices"}] * 2
    choice = {
        "index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids",
    }  # fmt: skip
    assert all(set(chunk["choices"][0]) == choice for chunk in tokens)
    assert [chunk["choices"][0]["finish_reason"] for chunk in tokens] == [None, "length"]
    assert last["choices"] == []
    assert set(last["usage"]) == {"prompt_tokens", "total_tokens", "completion_tokens"}
    assert last["usage"]["completion_tokens"] == 2
    assert "".join(c["choices"][0]["text"] for c in tokens) == engine.text("x", max_tokens=2)


def test_streamed_chat(engine: FakeEngine) -> None:
    first, *tokens = events(engine, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {"prompt_token_ids", "prompt_text"} < set(first)
    assert set(tokens[0]["choices"][0]) == {"index", "delta", "logprobs", "finish_reason", "token_ids"}
    assert set(tokens[-1]["choices"][0]) == set(tokens[0]["choices"][0]) | {"stop_reason"}
    assert "usage" not in tokens[-1]


def test_continuous_usage_grows_with_each_chunk(engine: FakeEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(engine, "/v1/completions", {"prompt": "x", "max_tokens": 3, "stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_several_prompts_and_samples_are_numbered_prompt_first(engine: FakeEngine) -> None:
    body = engine.complete(["one", "two"], n=2, max_tokens=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][2]["text"] == engine.text("two", max_tokens=4)
    assert body["usage"]["completion_tokens"] == 16


def test_token_ids_are_as_good_as_text(engine: FakeEngine) -> None:
    ids = engine.post("/tokenize", {"prompt": "some text"}).json()["tokens"]
    assert engine.text(ids, max_tokens=5) == engine.text("some text", max_tokens=5)
    assert engine.text([ids], max_tokens=5) == engine.text("some text", max_tokens=5)


def test_echo_puts_the_prompt_first(engine: FakeEngine) -> None:
    answer = engine.text("some text", max_tokens=2)
    assert engine.text("some text", max_tokens=2, echo=True) == "some text" + answer
    chunks = events(engine, "/v1/completions", {"prompt": "some text", "max_tokens": 2, "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "some text" + answer


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_and_are_never_streamed(engine: FakeEngine, include: bool) -> None:
    whole = engine.text("hello", max_tokens=10)
    stop = whole[7:11]
    cut = whole[: whole.find(stop) + (len(stop) if include else 0)]
    fields = {"max_tokens": 10, "stop": ["never", stop], "include_stop_str_in_output": include}
    choice = engine.complete("hello", **fields)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
    chunks = events(engine, "/v1/completions", {"prompt": "hello", **fields})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut
    assert chunks[-1]["choices"][0]["stop_reason"] == stop


def test_stop_token_ids_end_the_answer(engine: FakeEngine) -> None:
    ids = engine.complete("hello", max_tokens=6, return_token_ids=True)["choices"][0]["token_ids"]
    choice = engine.complete("hello", max_tokens=6, stop_token_ids=[ids[3]])["choices"][0]
    assert choice["stop_reason"] == ids[3]


def test_completion_logprobs(engine: FakeEngine) -> None:
    choice = engine.complete("hello", max_tokens=3, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 3, 6]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    assert all(value < 0 for value in logprobs["token_logprobs"])
    chunks = events(engine, "/v1/completions", {"prompt": "hello", "max_tokens": 3, "logprobs": 2})
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [3], [6]]


def test_chat_logprobs(engine: FakeEngine) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    choice = engine.post("/v1/chat/completions", body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert len(content[0]["top_logprobs"]) == 3
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]


def test_models(engine: FakeEngine) -> None:
    body = engine.get("/v1/models").json()
    card = {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
    assert [set(model) for model in body["data"]] == [card]
    assert body["data"][0]["id"] == "toy"


def test_tokenize_and_detokenize_are_inverse(engine: FakeEngine) -> None:
    body = engine.post("/tokenize", {"prompt": "Grüße 🌍", "return_token_strs": True}).json()
    assert set(body) == {"count", "max_model_len", "tokens", "token_strs"}
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert engine.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "Grüße 🌍"}
    chat = engine.post("/tokenize", {"messages": MESSAGES}).json()
    answer = engine.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]


def test_embeddings_as_floats_and_base64_are_equal(engine: FakeEngine) -> None:
    floats = engine.post("/v1/embeddings", {"input": ["a", "b"]}).json()
    encoded = engine.post("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}).json()
    assert [item["index"] for item in floats["data"]] == [0, 1]
    assert floats["data"][0]["embedding"] != floats["data"][1]["embedding"]
    raw = base64.b64decode(encoded["data"][0]["embedding"])
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert values == pytest.approx(floats["data"][0]["embedding"], rel=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "The model `other` does not exist."),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1, got 0."),
        ("/v1/completions", {"prompt": ""}, 400, "Either prompt"),
        ("/v1/completions", {"prompt": [2**40]}, 400, "out of vocabulary"),
        ("/v1/completions", {"prompt": [1] * 40000}, 400, "maximum context length is 32768 tokens"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 10**6},
            400,
            "cannot be greater than max_model_len",
        ),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature must be non-negative"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 1, "min_tokens": 2},
            400,
            "min_tokens must be less",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "stream_options": {"include_usage": True}},
            400,
            "Stream options",
        ),
        ("/v1/chat/completions", {"messages": "x"}, 400, "messages"),
        ("/v1/unknown", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
    ],
)
def test_wrong_requests_are_refused_with_vllms_error_body(
    engine: FakeEngine, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = engine.post(path, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert words in error["message"]


def test_a_body_that_is_not_json_is_refused(engine: FakeEngine) -> None:
    response = engine.session.post(engine.url + "/v1/completions", data=b"{", timeout=10)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


def test_the_request_id_comes_from_the_header(engine: FakeEngine) -> None:
    answer = engine.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Id": "abc"})
    assert answer.json()["id"] == "cmpl-abc"
