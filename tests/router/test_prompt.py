"""What a request costs and which prefix it shares, read off its bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.router.demand import Demand
from hpcserve.router.prompt import ANSWER_TOKENS, CHUNK, IMAGE_TOKENS, Prompts, _without_base64

CHAT = "/v1/chat/completions"
LONG = "The quick brown fox jumps over the lazy dog. " * 200


def demand(
    body: Any, path: str = CHAT, *, prompts: Prompts | None = None, headers: dict[bytes, bytes] | None = None
) -> Demand:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    exchange = SimpleNamespace(path=path, header=lambda name: (headers or {}).get(name))
    call: Any = SimpleNamespace(body=raw, fields=None, exchange=exchange)
    return (prompts or Prompts(["m"])).demand(call)


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "model": "m",
        "messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)],
        **more,
    }


def test_the_next_turn_shares_the_whole_chain_of_the_last() -> None:
    first = demand(chat(LONG))
    second = demand(chat(LONG, "An answer.", LONG, max_tokens=7, stream=True))
    assert len(first.chain) == (len(json.dumps(chat(LONG)["messages"])) - 1) // CHUNK
    assert second.chain[: len(first.chain)] == first.chain
    assert len(second.chain) > len(first.chain)


@given(st.integers(0, 3000))
def test_the_next_turn_shares_the_chain_wherever_the_last_chunk_ends(length: int) -> None:
    first, second = demand(chat("x" * length)), demand(chat("x" * length, "y", "z" * 3000))
    assert second.chain[: len(first.chain)] == first.chain


def test_prompts_that_differ_share_their_beginning_only() -> None:
    one, other = demand(chat(LONG + "one" + LONG)), demand(chat(LONG + "two" + LONG))
    same = [a == b for a, b in zip(one.chain, other.chain, strict=True)]
    assert same == sorted(same, reverse=True)
    assert sum(same) == (len(LONG) + 30) // CHUNK


@pytest.mark.parametrize(
    "more",
    [
        {"model": "adapter"},
        {"cache_salt": "s"},
        {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template": "{{ messages }}"},
        {"reasoning_effort": "high"},
    ],
)
def test_what_changes_the_tokens_before_the_messages_changes_the_chain(more: dict[str, Any]) -> None:
    assert not set(demand(chat(LONG)).chain) & set(demand({**chat(LONG), **more}).chain)


def test_tools_count_as_part_of_the_prefix() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": LONG}}]
    one, other = demand(chat("Hi", tools=tools)), demand(chat("Something else", tools=tools))
    assert one.chain
    assert one.chain == other.chain
    assert one.prompt_tokens > len(LONG) * 0.2


def test_completions_share_text_and_token_prefixes() -> None:
    path = "/v1/completions"
    one, longer = demand({"prompt": LONG}, path), demand({"prompt": LONG + LONG}, path)
    assert one.chain
    assert longer.chain[: len(one.chain)] == one.chain
    ids = list(range(3000))
    exact = demand({"prompt": ids}, path)
    assert exact.prompt_tokens == pytest.approx(3000, abs=2)
    assert exact.space is not None
    longer = demand({"prompt": [*ids, 1, 2, 3]}, path)
    assert longer.chain[: len(exact.chain)] == exact.chain


def test_several_prompts_in_one_request_are_never_translated() -> None:
    assert demand({"prompt": [LONG, LONG]}, "/v1/completions").space is None
    assert demand({"prompt": [[1, 2], [3]]}, "/v1/completions").space is None


def test_responses_and_anthropic_messages_are_understood() -> None:
    one = demand({"model": "m", "instructions": LONG, "input": "Hi"}, "/v1/responses")
    other = demand({"model": "m", "instructions": LONG, "input": "Bye"}, "/v1/responses")
    assert one.chain
    assert one.chain == other.chain
    system = {"model": "m", "system": LONG, "max_tokens": 9}
    one = demand({**system, "messages": [{"role": "user", "content": "Hi"}]}, "/v1/messages")
    other = demand({**system, "messages": [{"role": "user", "content": "Bye"}]}, "/v1/messages")
    assert one.chain
    assert one.chain == other.chain
    assert one.output_tokens == 9


def test_other_routes_have_no_chain() -> None:
    found = demand({"model": "m", "input": LONG}, "/v1/embeddings")
    assert found.chain == ()
    assert found.output_tokens == 0
    assert found.prompt_tokens > 1000


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"messages": 7}', b'{"messages": null}', b'{"messages": ""}',
        b'{"model": 3, "messages": [], "max_tokens": "x", "n": {}, "user": [], "priority": 1.5}',
        b'{"messages": "\xff\xfe"}', b"[" * 20000, b'{"messages":' + b"[" * 20000,
        b"\x00" * 5000, b'{"prompt": []}', b'{"prompt": [ ]}',
        b'{"prompt": " "}', b'{"prompt": [', b'{"messages": [}', b'{"prompt": 7}', b'{"input": 7}',
    ],
)  # fmt: skip
def test_a_body_that_says_nothing_sensible_still_gets_a_demand(body: bytes) -> None:
    found = demand(body)
    assert found.chain == ()
    assert found.prompt_tokens >= 1
    assert found.output_tokens >= 0


def test_a_form_is_not_looked_into() -> None:
    found = demand(b"x" * 10_000, headers={b"content-type": b"multipart/form-data; boundary=x"})
    assert (found.chain, found.prompt_tokens) == ((), 1)


def test_images_count_as_images_and_not_as_text() -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0K" * 20_000}},
    ]
    found = demand({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert IMAGE_TOKENS <= found.prompt_tokens < IMAGE_TOKENS + 200
    assert found.space is None
    assert len(found.chain) > 100


@given(st.lists(st.one_of(st.integers(1, 60), st.integers(990, 3100)), max_size=20))
def test_images_are_found_wherever_they_begin(lengths: list[int]) -> None:
    data = b" ".join(b"x" * length for length in lengths) + b" "
    found = _without_base64(memoryview(data))
    images = re.findall(rb"x{2000,}", data)
    assert found.images == len(images)
    assert found.size == len(data) - sum(map(len, images))
    assert found.plain is (not images)


def test_expected_answers_are_bounded_by_what_the_request_allows() -> None:
    assert demand(chat("Hi")).output_tokens == ANSWER_TOKENS
    assert demand(chat("Hi", max_tokens=5)).output_tokens == 5
    assert demand(chat("Hi", max_completion_tokens=6, max_tokens=5)).output_tokens == 6
    assert demand(chat("Hi", max_tokens=5, n=3)).output_tokens == 15


def test_estimates_learn_from_what_engines_counted() -> None:
    prompts = Prompts(["m"])
    before = demand(chat(LONG), prompts=prompts)
    for _ in range(200):
        prompts.learn(before, before.prompt_bytes // 8, 40)
    after = demand(chat(LONG), prompts=prompts)
    assert after.prompt_tokens == pytest.approx(before.prompt_bytes / 8, rel=0.02)
    assert after.chunk_tokens == pytest.approx(CHUNK / 8, rel=0.02)
    assert after.output_tokens == pytest.approx(40, abs=2)
    assert demand({**chat(LONG), "model": "other"}, prompts=prompts).prompt_tokens == before.prompt_tokens


def test_names_of_models_from_clients_take_bounded_memory() -> None:
    prompts = Prompts(["m"])
    for number in range(3000):
        demand({**chat("Hi"), "model": f"m{number}"}, prompts=prompts)
    assert len(prompts._models) <= 1024


def test_a_session_comes_from_the_header_or_the_body() -> None:
    assert demand(chat("Hi", user="u")).session == "u"
    assert demand(chat("Hi", user="u", prompt_cache_key="k")).session == "k"
    assert demand(chat("Hi", user="u", session_id="s")).session == "s"
    assert demand(chat("Hi", user="u"), headers={b"x-session-id": b"h"}).session == "h"
    assert demand(chat("Hi")).session is None
    long = demand(chat("Hi", user="u" * 10_000)).session
    assert long is not None
    assert len(long) < 100
    # Not what only looks like one, inside of the prompt.
    assert demand(chat('"user": "x", "session_id": "y"')).session is None


@pytest.mark.parametrize(
    ("more", "header", "priority"),
    [
        ({}, None, 0),
        ({"service_tier": "flex"}, None, -1),
        ({"service_tier": "auto"}, None, 0),
        ({"priority": 5}, None, -5),
        ({"priority": -5}, None, 0),
        ({"priority": 10**9}, None, -100),
        ({}, b"batch", -1),
        ({}, b"interactive", 0),
        ({}, b"-3", -3),
        ({}, b"7", 0),
        ({"priority": 5}, b"0", 0),
    ],
)
def test_a_client_can_step_back_but_not_forward(
    more: dict[str, Any], header: bytes | None, priority: int
) -> None:
    headers = {} if header is None else {b"x-hpcserve-priority": header}
    assert demand(chat("Hi", **more), headers=headers).priority == priority


def test_chains_are_the_same_in_every_process() -> None:
    program = (
        "from tests.router.test_prompt import LONG, chat, demand;"
        "print(hash('x') and demand(chat(LONG)).chain[-1], demand(chat(LONG)).space)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = demand(chat(LONG))
    assert told.stdout.split() == [str(here.chain[-1]), str(here.space)]
