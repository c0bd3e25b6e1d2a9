"""Several choices and several prompts: over prefill and decode the same as from one engine."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from .stubs import Exchange, Seen, answer_with, sse

ASKS = {
    "three choices": {"prompt": "a b c d", "n": 3, "seed": 5},
    "two prompts": {"prompt": ["a b", "c d e"]},
    "two prompts, two choices": {"prompt": ["a b", "c d e"], "n": 2, "seed": 7},
    "token ids": {"prompt": [[1, 2, 3], [4, 5]], "n": 2, "seed": 0},
    "one prompt of token ids": {"prompt": [1, 2, 3], "seed": 4},
    "one prompt in a list": {"prompt": ["a b c"]},
    "chat": {"messages": [{"role": "user", "content": "a b c"}], "n": 3, "seed": 1},
}


def _path(ask):  # type: ignore[no-untyped-def]
    return "/v1/chat/completions" if "messages" in ask else "/v1/completions"


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
async def test_whole_answer_equals_that_of_one_engine(start, ask):
    one, two = await start("aggregated-0"), await start("prefill-0", "decode-0", "decode-1")
    body = {"model": "toy", **ask}
    expected = await one.json(_path(ask), body, x_request_id="r")
    assert await two.json(_path(ask), body, x_request_id="r") == expected
    for seen in two["decode-0"].seen + two["decode-1"].seen:
        assert seen.body["kv_transfer_params"]["remote_engine_id"] == "prefill-0"


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
async def test_stream_equals_that_of_one_engine(start, ask, include_usage):
    one, two = await start("aggregated-0"), await start("prefill-0", "decode-0", "decode-1")
    body = {"model": "toy", **ask, "stream": True, "stream_options": {"include_usage": include_usage}}
    answers = []
    for bench in (one, two):
        _, headers, data = await bench.ask(_path(ask), body, x_request_id="r")
        assert headers["content-type"].startswith("text/event-stream")
        *events, done = sse(data)
        assert done == "[DONE]"
        by_choice: dict[int, list[object]] = {}
        for event in events:
            index = event["choices"][0]["index"] if event["choices"] else -1
            by_choice.setdefault(index, []).append(event)
        answers.append(by_choice)
    assert answers[1] == answers[0]
    assert (-1 in answers[1]) == include_usage


async def test_tool_calls_of_each_choice_keep_their_own_indices(start):
    bench = await start("prefill-0", "decode-0")
    calls = [{"index": 1, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        choice = {"index": 0, "delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}
        event = {"id": "x", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        exchange.write(b"data: " + msgspec.json.encode(event) + b"\n\ndata: [DONE]\n\n")
        exchange.finish()
        return True

    bench["decode-0"].behave = behave
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "toy", **ASKS["chat"], "tools": tools, "tool_choice": "required", "stream": True}
    *events, done = sse((await bench.ask("/v1/chat/completions", body))[2])
    assert done == "[DONE]"
    assert sorted(event["choices"][0]["index"] for event in events) == [0, 1, 2]
    assert all(event["choices"][0]["delta"] == {"tool_calls": calls} for event in events)
    assert all(event["usage"]["completion_tokens"] == 2 for event in events)
    assert all(seen.body["tool_choice"] == "required" for seen in bench["prefill-0"].seen)


@pytest.mark.parametrize("choices", [b"5", b"[5]", b'{"a": 1}', b'"x"'])
async def test_event_of_another_shape_ends_the_stream_with_an_error(start, choices):
    bench = await start("prefill-0", "decode-0")

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b'data: {"id": "x", "choices": %b}\n\n' % choices)
        exchange.finish()
        return True

    bench["decode-0"].behave = behave
    _, _, data = await bench.ask("/v1/completions", {"model": "toy", "prompt": "a", "n": 2, "stream": True})
    *_, error = sse(data)
    assert error["error"]["code"] == "worker_protocol"


async def test_legs_of_one_request_have_ids_of_their_own_shared_by_both_engines(start):
    bench = await start("prefill-0", "decode-0")
    await bench.json("/v1/completions", {"model": "toy", "prompt": "a", "n": 3}, x_request_id="r")
    ids = [sorted(seen.header(b"x-request-id") for seen in stub.seen) for stub in bench.stubs.values()]
    assert ids == [[b"r-0", b"r-1", b"r-2"]] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_of_one_choice_is_the_answer(start, stream):
    bench = await start("prefill-0", "decode-0")
    bench["decode-0"].behave = answer_with(400, "no")
    body = {"model": "toy", "prompt": ["a", "b"], "stream": stream}
    status, error = await bench.error("/v1/completions", body)
    assert (status, error["message"]) == (400, "no")


async def test_error_event_of_one_choice_ends_the_whole_stream(start):
    bench = await start("prefill-0", "decode-0")

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        if seen.body["prompt"] == "ok":
            return False
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "one"}]}\n\n')
        await asyncio.sleep(0.02)
        exchange.write(b'data: {"error": {"message": "boom", "code": 500}}\n\ndata: [DONE]\n\n')
        exchange.finish()
        return True

    bench["decode-0"].behave = behave
    body = {"model": "toy", "prompt": ["ok", "bad"], "stream": True}
    _, _, data = await bench.ask("/v1/completions", body)
    *_, last = sse(data)
    assert last["error"]["message"] == "boom"


async def test_absurd_number_of_choices_is_refused(start):
    bench = await start("prefill-0", "decode-0")
    status, _ = await bench.error("/v1/completions", {"model": "toy", "prompt": "a", "n": 10**9})
    assert status == 400
    assert not bench["prefill-0"].seen


@pytest.mark.parametrize("n", [0, -1, "3", 2.5, True, None])
async def test_malformed_n_is_left_to_the_engine(start, n):
    bench = await start("prefill-0", "decode-0")
    bench["decode-0"].behave = answer_with(400, "n is wrong")
    body = {"model": "toy", "prompt": "a", "n": n}
    assert (await bench.error("/v1/completions", body))[1]["message"] == "n is wrong"
    assert bench["decode-0"].seen[0].body["n"] == n
