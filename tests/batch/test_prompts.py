"""Rows become requests, or say why they can't."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.inputs.rows import Row
from hpcserve.batch.prompts import Prompts, PromptSpec, Request, RowError, seed_of
from hpcserve.errors import ConfigError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GREEDY = {"temperature": 0}


def row(number: int = 0, **columns: Any) -> Row:
    return Row(number, f"data.jsonl:{number + 1}", columns)


def requests(row: Row, **spec: Any) -> list[Request]:
    return Prompts(PromptSpec(model="org/model", **spec), "rows").requests(row)


def body(row: Row, **spec: Any) -> dict[str, Any]:
    (request,) = requests(row, **{"sampling": GREEDY} | spec)
    decoded: dict[str, Any] = json.loads(request.body)
    return decoded


def row_error(row: Row, **spec: Any) -> str:
    with pytest.raises(RowError) as error:
        requests(row, **spec)
    assert str(error.value) == error.value.message
    return error.value.message


def refusal(kind: Any = "rows", **spec: Any) -> tuple[str, str | None]:
    with pytest.raises(ConfigError) as error:
        Prompts(PromptSpec(model="org/model", **spec), kind)
    return error.value.message, error.value.hint


# Plain rows


def test_a_template_makes_a_chat() -> None:
    (request,) = requests(
        row(q="Why?", lang="German"),
        template="{{ q }}\n",
        system="Answer in {{ lang }}.",
        sampling={"max_tokens": 7, "temperature": 0, "stop": ["\n"]},
    )
    assert json.loads(request.body) == {
        "model": "org/model",
        "messages": [
            {"role": "system", "content": "Answer in German."},
            {"role": "user", "content": "Why?"},
        ],
        "max_tokens": 7,
        "temperature": 0,
        "stop": ["\n"],
    }
    assert request._replace(body=b"") == Request(
        path=CHAT,
        body=b"",
        text=b"system\nAnswer in German.\nuser\nWhy?",
        max_tokens=7,
        custom_id=None,
        prompt_tokens=None,
    )


def test_a_system_message_that_comes_out_empty_is_left_out() -> None:
    made = body(row(q="Why?", s=None), template="{{ q }}", system="{{ s or '' }}")
    assert [message["role"] for message in made["messages"]] == ["user"]


def test_a_column_of_prompts_is_completed() -> None:
    (request,) = requests(row(p="Once upon"), prompt_column="p", sampling=GREEDY | {"max_tokens": 3})
    assert request.path == COMPLETIONS
    assert json.loads(request.body) == {
        "model": "org/model",
        "prompt": "Once upon",
        "temperature": 0,
        "max_tokens": 3,
    }
    assert (request.text, request.max_tokens, request.prompt_tokens) == (b"Once upon", 3, None)


def test_a_prompt_may_be_token_ids_and_their_number_is_exact() -> None:
    (request,) = requests(row(p=[1, 22, 333]), prompt_column="p", sampling=GREEDY)
    assert json.loads(request.body)["prompt"] == [1, 22, 333]
    assert (request.text, request.prompt_tokens) == (b"1 22 333", 3)


def test_completions_end_after_16_tokens_where_nothing_is_said_and_chats_do_not() -> None:
    assert requests(row(p="a"), prompt_column="p")[0].max_tokens == 16
    assert requests(row(p="a"), template="{{ p }}")[0].max_tokens is None
    sampling = {"max_completion_tokens": 5, "max_tokens": 9}
    assert requests(row(p="a"), template="{{ p }}", sampling=sampling)[0].max_tokens == 5


CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "What is it?", "image_url": None}], "name": None},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
]
PLAIN_CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
]


@pytest.mark.parametrize("value", [CONVERSATION, json.dumps(CONVERSATION)])
def test_a_column_of_messages_is_a_chat_and_nulls_of_structs_are_left_out(value: Any) -> None:
    assert body(row(m=value), messages_column="m")["messages"] == PLAIN_CONVERSATION


def test_images_stand_in_the_text_as_hashes() -> None:
    def text(url: str) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        return requests(row(m=[{"role": "user", "content": content}]), messages_column="m")[0].text

    assert text("data:" + "x" * 10_000) != text("data:" + "y" * 10_000)
    assert text("data:" + "x" * 10_000).startswith(b"user\n<image_url ")
    assert text("data:" + "x" * 10_000).endswith(b">\nWhat is it?")
    assert len(text("data:" + "x" * 10_000)) < 60


@pytest.mark.parametrize(
    ("columns", "spec", "message"),
    [
        ({"a": 1}, {"prompt_column": "p"}, "no column 'p'; the row has: a"),
        ({"prompt": "x"}, {"prompt_column": "promt"}, "no column 'promt'; did you mean 'prompt'?"),
        ({}, {"messages_column": "m"}, "no column 'm'; the row has: no columns"),
        ({"p": ""}, {"prompt_column": "p"}, "column 'p' is empty"),
        ({"p": []}, {"prompt_column": "p"}, "column 'p' is empty"),
        ({"p": 3}, {"prompt_column": "p"}, "column 'p' must be text or a list of token ids, not 3"),
        ({"p": None}, {"prompt_column": "p"}, "column 'p' must be text or a list of token ids, not null"),
        ({"p": True}, {"prompt_column": "p"}, "column 'p' must be text or a list of token ids, not true"),
        (
            {"p": [1, -1]},
            {"prompt_column": "p"},
            "column 'p' must be text or a list of token ids, not a list",
        ),
        ({"p": ["a"]}, {"prompt_column": "p"}, "column 'p' must be text or a list of token ids, not a list"),
        (
            {"p": b"a"},
            {"prompt_column": "p"},
            "column 'p' must be text or a list of token ids, not this type",
        ),
        ({"m": {}}, {"messages_column": "m"}, "column 'm' must be a list of messages, not an object"),
        ({"m": "{}"}, {"messages_column": "m"}, "column 'm' must be a list of messages, not an object"),
        ({"m": []}, {"messages_column": "m"}, "column 'm' is empty"),
        (
            {"m": "hello"},
            {"messages_column": "m"},
            "column 'm' is text, but no JSON: JSON is malformed: invalid character (byte 0)",
        ),
        (
            {"m": [{"role": "user", "content": "a"}, {"content": "b"}]},
            {"messages_column": "m"},
            "column 'm': message 1 must be an object with a role",
        ),
        ({"m": ["hello"]}, {"messages_column": "m"}, "column 'm': message 0 must be an object with a role"),
        (
            {"m": [{"role": "user", "content": 3}]},
            {"messages_column": "m"},
            "column 'm': the content of message 0 must be text or a list of parts",
        ),
        (
            {"m": [{"role": "user", "content": [{"type": "image", "bytes": b"x"}]}]},
            {"messages_column": "m"},
            "messages hold binary data; images are data URLs or links",
        ),
        ({"q": " \n"}, {"template": "{{ q }}"}, "template: the text is empty"),
        (
            {"q": "\ud800"},
            {"template": "{{ q }}"},
            "the request can't be written as JSON: 'utf-8' codec can't encode character '\\ud800' "
            "in position 0: surrogates not allowed",
        ),
    ],
)
def test_a_row_that_can_not_be_rendered_says_why(
    columns: dict[str, Any], spec: dict[str, Any], message: str
) -> None:
    assert row_error(row(**columns), **spec) == message


# Samples and seeds


def test_each_sample_has_a_seed_of_its_own_and_nothing_else_differs() -> None:
    made = [json.loads(r.body) for r in requests(row(3, q="a"), template="{{ q }}", n=3, seed=9)]
    seeds = [one.pop("seed") for one in made]
    assert seeds == [seed_of(9, 3, sample) for sample in range(3)]
    assert len(set(seeds)) == 3
    assert made[0] == made[1] == made[2]


@given(run=st.integers(), number=st.integers(0, 1 << 40), sample=st.integers(0, 1 << 20))
def test_seeds_are_31_bits(run: int, number: int, sample: int) -> None:
    assert 0 <= seed_of(run, number, sample) < 1 << 31


def test_a_seed_stays_the_same_from_release_to_release() -> None:
    """Else an answer that is computed again after an update would be another one."""
    assert [seed_of(0, 0, 0), seed_of(1, 2, 3), seed_of(-1, 10_000_000, 63)] == [
        1612233712,
        1658263971,
        566151957,
    ]


@pytest.mark.parametrize(
    ("sampling", "run", "n", "seeds"),
    [
        ({}, None, 1, [None]),
        ({}, 0, 1, [seed_of(0, 5, 0)]),
        ({"temperature": 0.7}, 3, 1, [seed_of(3, 5, 0)]),
        ({"temperature": 0}, 3, 1, [None]),
        ({"temperature": 0.0}, 3, 1, [None]),
        ({"temperature": 0}, None, 2, [seed_of(0, 5, 0), seed_of(0, 5, 1)]),
        ({"seed": 42}, 3, 1, [42]),
        ({"seed": None}, 3, 2, [None, None]),
    ],
)
def test_who_asks_for_seeds_or_draws_several_samples_has_them(
    sampling: dict[str, Any], run: int | None, n: int, seeds: list[int | None]
) -> None:
    made = requests(row(5, q="a"), template="{{ q }}", sampling=sampling, n=n, seed=run)
    assert [json.loads(request.body).get("seed") for request in made] == seeds


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), n=st.integers(1, 4))
def test_bodies_are_json_and_hold_what_the_row_holds(text: str, n: int) -> None:
    for request in requests(row(p=text), prompt_column="p", n=n):
        assert json.loads(request.body)["prompt"] == text
        assert request.text == text.encode()


# What is refused at once


WAYS = (
    "A template makes a chat of columns; the prompt column is completed as it is; the messages column"
    " has whole chats."
)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        (
            {},
            "one of --template, --prompt-column, --messages-column must say what the prompt is, not none",
            WAYS,
        ),
        (
            {"template": "a", "messages_column": "b"},
            "one of --template, --prompt-column, --messages-column must say what the prompt is, "
            "not --template and --messages-column",
            WAYS,
        ),
        (
            {"prompt_column": "a", "system": "b"},
            "--system goes with --template, not with --prompt-column",
            "Put its text into the column.",
        ),
        (
            {"template": "a", "n": 0},
            "--samples must be at least 1, not 0",
            "It is the number of answers to a row.",
        ),
        (
            {"template": "a", "n": 4, "sampling": {"seed": 1}},
            "--sampling: with `seed`, all 4 samples of a row would be the same",
            "Give --seed, of which each sample's is made.",
        ),
        *(
            (
                {"template": "a", "sampling": {name: value}},
                f"--sampling: `{name}` can't be set: {why}",
                remedy,
            )
            for name, value, why, remedy in [
                ("stream", False, "answers are read whole", "Leave it out."),
                ("stream_options", {}, "answers are read whole", "Leave it out."),
                ("background", True, "answers are waited for", "Leave it out."),
                ("n", 1, "samples are requests of their own", "Give --samples."),
                ("model", "x", "it is the run's", "Leave it out."),
                ("messages", [], "rows have them", "Give --messages-column or --template."),
                ("prompt", "", "rows have it", "Give --prompt-column."),
            ]
        ),
    ],
)
def test_a_wrong_spec_is_told_before_any_row(spec: dict[str, Any], message: str, hint: str) -> None:
    assert refusal(**spec) == (message, hint)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        *(
            (
                {name: value},
                f"--{name.replace('_', '-')} is for plain rows, but the input's lines are OpenAI requests",
                "Write it into the lines' bodies.",
            )
            for name, value in [
                ("template", "a"),
                ("system", "a"),
                ("prompt_column", "a"),
                ("messages_column", "a"),
                ("sampling", GREEDY),
            ]
        ),
        (
            {"n": 2},
            "--samples 2: the input's lines are OpenAI requests, which are sent once",
            "Set `n` in the lines' bodies.",
        ),
    ],
)
def test_openai_lines_say_all_themselves(spec: dict[str, Any], message: str, hint: str) -> None:
    assert refusal("openai", **spec) == (message, hint)


# OpenAI lines


def openai(**columns: Any) -> Request:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": [{"role": "user"}]}}
    (request,) = Prompts(PromptSpec(model="org/model"), "openai").requests(row(**line | columns))
    return request


def test_of_an_openai_line_only_the_model_is_replaced() -> None:
    sent = {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "hi", "name": None}],
        "n": 2,
        "stream": False,
        "seed": 1,
        "max_completion_tokens": 8,
        "logit_bias": {"50256": -100},
    }
    request = openai(custom_id="x-1", body=sent)
    assert json.loads(request.body) == sent | {"model": "org/model"}
    assert (request.path, request.custom_id, request.max_tokens) == (CHAT, "x-1", 8)


@pytest.mark.parametrize(
    ("url", "body", "text", "max_tokens", "prompt_tokens"),
    [
        (COMPLETIONS, {"prompt": "a"}, b"a", 16, None),
        (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 3}, b"5 6", 3, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 3}, b"a\nb", 3, None),
        ("/v1/embeddings", {"input": ["a", "b"]}, b"a\nb", 0, None),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, b"1 2\n3", 0, None),
        ("/v1/score", {"text_1": "q", "text_2": ["a", "b"]}, b"q\na\nb", 0, None),
        ("/v1/rerank", {"query": "q", "documents": ["a", {"text": "b"}]}, b"q\na\nb", 0, None),
        ("/v1/responses", {"instructions": "s", "input": "a", "max_output_tokens": 4}, b"s\na", 4, None),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
            b"user\na",
            None,
            None,
        ),
        (
            CHAT,
            {"tools": [{"type": "function"}], "messages": [{"role": "user", "content": "a"}]},
            b'{"type":"function"}\nuser\na',
            None,
            None,
        ),
    ],
)
def test_every_path_has_its_text_and_its_limit(
    url: str, body: dict[str, Any], text: bytes, max_tokens: int | None, prompt_tokens: int | None
) -> None:
    request = openai(url=url, body=body)
    assert (request.text, request.max_tokens, request.prompt_tokens) == (text, max_tokens, prompt_tokens)
    assert request.path == url


PATHS = "/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/score, /v1/rerank, /v1/responses"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url": "/v1/images"}, f'url must be one of {PATHS}, not "/v1/images"'),
        ({"url": None}, f"url must be one of {PATHS}, not null"),
        ({"url": []}, f"url must be one of {PATHS}, not a list"),
        ({"method": "GET"}, 'method must be "POST", not "GET"'),
        ({"method": None}, 'method must be "POST", not null'),
        ({"body": "x" * 100}, f'body must be an object, not "{"x" * 56}…'),
        ({"body": {"messages": [1], "stream": True}}, "body: stream can't be used: answers are read whole"),
        (
            {"body": {"input": "a", "background": True}},
            "body: background can't be used: answers are waited for",
        ),
        ({"body": {}}, "body: no prompt; for /v1/chat/completions it is messages"),
        ({"body": {"messages": []}}, "body: no prompt; for /v1/chat/completions it is messages"),
        (
            {"url": COMPLETIONS, "body": {"prompt": None}},
            "body: no prompt; for /v1/completions it is prompt or prompt_embeds",
        ),
    ],
)
def test_a_bad_openai_line_says_why(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        openai(**columns)
    assert error.value.message == message


@given(
    start=st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1),
    one=st.text("xyz", max_size=3),
    other=st.text("xyz", max_size=3),
)
def test_prompts_that_begin_alike_have_texts_that_begin_alike(start: list[str], one: str, other: str) -> None:
    def text(end: str) -> bytes:
        return openai(body={"messages": [{"role": "user", "content": part} for part in [*start, end]]}).text

    shared = "\n".join(f"user\n{part}" for part in start).encode()
    assert text(one).startswith(shared)
    assert text(other).startswith(shared)


@pytest.mark.parametrize(("most", "known"), [(5, 5), (-1, None), (1 << 32, None), ("many", None)])
def test_a_bound_that_no_engine_takes_is_left_to_the_engine(most: Any, known: int | None) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": most}
    columns = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": body}
    [request] = Prompts(PromptSpec(model="tiny"), "openai").requests(Row(0, "x:1", columns))
    assert request.max_tokens == known
    assert json.loads(request.body)["max_tokens"] == most
