"""The same tokens always continue in the same way, wherever and however they are answered."""

from __future__ import annotations

import pytest

from .conftest import Start
from .running import FakeEngine

PROMPT = "The capital of France is"


def test_the_same_prompt_has_the_same_answer_and_another_has_another(engine: FakeEngine) -> None:
    answer = engine.text(PROMPT, max_tokens=20)
    assert engine.text(PROMPT, max_tokens=20) == answer
    assert engine.text(PROMPT + "!", max_tokens=20) != answer


def test_two_processes_agree(engine: FakeEngine, start: Start) -> None:
    assert start().text(PROMPT, max_tokens=20) == engine.text(PROMPT, max_tokens=20)


@pytest.mark.parametrize("split", [1, 7, 19])
def test_prompt_and_part_of_the_answer_continue_as_the_first_run_did(engine: FakeEngine, split: int) -> None:
    whole = engine.complete(PROMPT, max_tokens=20, return_token_ids=True, seed=7)["choices"][0]
    ids = whole["prompt_token_ids"] + whole["token_ids"][:split]
    rest = engine.complete(ids, max_tokens=20 - split, return_token_ids=True, seed=7)["choices"][0]
    assert whole["token_ids"][:split] + rest["token_ids"] == whole["token_ids"]
    as_text = PROMPT + whole["text"][: 3 * split]
    assert engine.text(as_text, max_tokens=20 - split, seed=7) == rest["text"]


def test_an_answer_of_no_given_length_ends_where_its_continuation_ends(engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "hello"}]
    whole = engine.post("/v1/chat/completions", {"messages": messages}).json()
    text = whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert 1 < whole["usage"]["completion_tokens"] <= 257
    part = {"role": "assistant", "content": text[:3]}
    body = {
        "messages": [*messages, part],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    rest = engine.post("/v1/chat/completions", body).json()
    assert text[:3] + rest["choices"][0]["message"]["content"] == text


def test_seeds_and_samples_differ_unless_greedy(engine: FakeEngine) -> None:
    def texts(**fields: object) -> list[str]:
        return [choice["text"] for choice in engine.complete(PROMPT, max_tokens=8, **fields)["choices"]]

    assert len(set(texts(n=3))) == 3
    assert texts(seed=1) != texts(seed=2)
    assert texts(n=2, seed=1) == texts(n=2, seed=1)
    assert len({*texts(n=2, temperature=0), *texts(temperature=0, seed=9)}) == 1


def test_ignoring_eos_uses_all_of_max_tokens_and_min_tokens_keep_it_going(engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "hello"}]
    ends = engine.post("/v1/chat/completions", {"messages": messages}).json()["usage"]["completion_tokens"]
    longer = {"messages": messages, "min_tokens": ends + 1}
    assert engine.post("/v1/chat/completions", longer).json()["usage"]["completion_tokens"] > ends
    exact = {"messages": messages, "max_tokens": ends + 5, "ignore_eos": True}
    answer = engine.post("/v1/chat/completions", exact).json()
    assert answer["usage"]["completion_tokens"] == ends + 5
    assert answer["choices"][0]["finish_reason"] == "length"
