"""Streams as engines write them, cut anywhere: the same output and the same account as event by event."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.router.stream.asked import Asked
from hpcserve.router.stream.events import HELD_MAX, EventStream
from hpcserve.router.stream.generated import EngineFault, GeneratedStream

ACCOUNT = (
    "chat", "done", "events", "finished", "has_error", "head", "ids", "introduced", "plain", "prompt_ids",
    "reached", "single", "text", "usage",
)  # fmt: skip
TEXTS = (
    " hello", "", "a", '"},"logprobs":', '","logprobs":', '"token_ids":[9]', "\n\n", "data: [DONE]\n\n",
    "日本",
    "\\", "5", '"error"', "\u2028", "😀", "]}]}\n\n",
)  # fmt: skip
DONE = b"data: [DONE]\n\n"


def event(chat: bool, choices: list[Any], **more: Any) -> bytes:
    kind = "chat.completion.chunk" if chat else "text_completion"
    chunk = {"id": "cmpl-1", "object": kind, "created": 17, "model": "toy", "choices": choices, **more}
    return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def choice(
    chat: bool, text: str, ids: list[int] | None, finish: str | None, index: int = 0
) -> dict[str, Any]:
    """As vLLM 0.32 writes them, and the engines of our tests."""
    if chat:
        one: dict[str, Any] = {"index": index, "delta": {"content": text}, "logprobs": None}
        one |= {"finish_reason": finish} | ({} if finish is None else {"stop_reason": None})
        return one | {"token_ids": ids}
    return {
        "index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None,
        "prompt_token_ids": None, "token_ids": ids,
    }  # fmt: skip


texts = st.sampled_from(TEXTS) | st.text(max_size=5)
ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=3)


@st.composite
def tokens(draw: st.DrawFn, chat: bool) -> bytes:
    named = draw(st.none() | ids | st.just([7]) | st.just([1917]) | st.just([]))
    return event(chat, [choice(chat, draw(texts), named, None)])


@st.composite
def odd(draw: st.DrawFn, chat: bool) -> bytes:
    """Events that are no plain token."""
    one = choice(chat, draw(texts), draw(ids), None, index=draw(st.integers(0, 2)))
    usage = {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
    delta = one.get("delta", {})
    kind = draw(st.integers(0, 17))
    if kind == 0:
        one["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}], "tokens": ["x"]}
    elif kind == 1:
        delta["tool_calls"] = [{"index": 0, "function": {"arguments": '{"a":'}}]
    elif kind == 2:
        one["delta"] = {"reasoning": draw(texts)}
    elif kind == 3:
        return event(chat, [one], usage=usage)
    elif kind == 4:
        return event(chat, [one, choice(chat, "b", [4], None, index=1)])
    elif kind == 5:
        return event(chat, [], usage=usage | {"prompt_tokens_details": {"cached_tokens": 2}})
    elif kind == 6:
        return b": a comment\n\n"
    elif kind == 7:
        return b"event: x\n" + event(chat, [one])
    elif kind == 8:
        return event(chat, [one]).replace(b"data: ", b"data:", 1)
    elif kind == 9:
        odd_ones = ["[]", "7", "{", "null", '{"choices":7}', '{"choices":{}}', '{"choices":[7]}']
        said = draw(st.sampled_from(odd_ones))
        return b"data: " + said.encode() + b"\n\n"
    elif kind == 10:
        one["delta"] = draw(st.sampled_from([None, [], "x", {"role": "assistant"}, {"content": None}]))
    elif kind == 11:
        one["text"] = one["token_ids"] = None
    elif kind == 12:
        one["prompt_token_ids"] = draw(ids)
    elif kind == 13:
        return draw(st.sampled_from([DONE, b"data:[DONE]\n\n", b"data:  [DONE]\n\n", b"\n\n"]))
    elif kind == 14:
        return event(chat, [one], prompt_token_ids=draw(ids), prompt_text=None)
    elif kind == 15:
        return b'data: {"error": {"message": "no", "code": 400}}\n\n'
    elif kind == 16:
        return b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n"
    return event(chat, [one], error=None)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bool, list[bytes]]:
    chat = draw(st.booleans())
    delta = {"role": "assistant", "content": ""}
    role = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    found = []
    if draw(st.booleans()):
        count = draw(st.sampled_from([0, 1, 3, 300]))
        named = {"prompt_token_ids": list(range(count))} if count else {}
        found.append(event(True, [role], **named))
    usually = st.one_of(tokens(chat), tokens(chat), tokens(chat), odd(chat))
    found += draw(st.lists(usually, max_size=12))
    finish = draw(st.sampled_from([None, "stop", "length", "abort"]))
    if finish is not None:
        found.append(event(chat, [choice(chat, draw(texts), draw(st.none() | ids), finish)]))
    found += draw(
        st.sampled_from(
            [
                [],
                [DONE],
                [event(chat, [], usage={"prompt_tokens": 3, "completion_tokens": 3}), DONE],
                [b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n', DONE],
            ]
        )
    )
    if draw(st.booleans()) and draw(st.booleans()):
        found = [part.replace(b"\n", b"\r\n") for part in found]
    return chat, found


def fed(chat: bool, pieces: list[bytes], asked: Asked, *, end: bool = True) -> tuple[bytes, dict[str, Any]]:
    """All that was written, and the account, up to the engine's fault if there is one."""
    out: list[bytes] = []
    prompts: list[bytes] = []
    stream = GeneratedStream(
        out.append, asked, chat=chat, on_prompt_ids=lambda raw: prompts.append(raw) is None
    )
    account: dict[str, Any] = {}
    try:
        for piece in pieces:
            stream.feed(piece)
        if end:
            stream.end()
    except EngineFault as fault:
        account["fault"] = (fault.message, fault.status, fault.event)
    account |= {name: getattr(stream, name) for name in ACCOUNT} | {"prompts": prompts}
    return b"".join(out), account


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(whole) + 1) for place in places} | {0, len(whole)})
    return [whole[start:stop] for start, stop in itertools.pairwise(at)]


asking = st.builds(Asked, wants_ids=st.booleans(), wants_usage=st.booleans())
places = st.lists(st.integers(0, 1 << 20), max_size=30)


@settings(max_examples=200)
@given(streams(), places, asking)
def test_cuts_change_nothing(stream: tuple[bool, list[bytes]], places: list[int], asked: Asked) -> None:
    chat, events = stream
    assert fed(chat, cut(b"".join(events), places), asked) == fed(chat, events, asked)


@given(streams(), places, st.integers(0, 1 << 20))
def test_a_half_event_never_counts(stream: tuple[bool, list[bytes]], places: list[int], end: int) -> None:
    chat, events = stream
    asked = Asked(wants_ids=False, wants_usage=False)
    whole = b"".join(events)
    whole = whole[: end % (len(whole) + 1)]
    complete, left = [], len(whole)
    for one in events:
        left -= len(one)
        if left < 0:
            break
        complete.append(one)
    assert fed(chat, cut(whole, places), asked, end=False) == fed(chat, complete, asked)


@given(streams(), places)
def test_events_passed_on_unread_are_whole_and_the_same(
    stream: tuple[bool, list[bytes]], places: list[int]
) -> None:
    _, events = stream
    whole = b"".join(events)
    out: list[bytes] = []
    one = EventStream(out.append)
    for piece in cut(whole, places):
        one.feed(piece)
    assert all(part.endswith((b"\n\n", b"\r\n\r\n")) for part in out)
    one.end()
    assert b"".join(out) == whole
    assert one.has_error == any(part.startswith(b'data: {"error": {') for part in events)


@pytest.mark.parametrize("size", [1, 1000, 16_384, 10_000_000])
def test_an_event_too_long_to_hold(size: int) -> None:
    long = event(True, [choice(True, "x" * (HELD_MAX + 20_000), [1], None)])
    start = HELD_MAX - 2000
    pieces = [long[:start], *(long[at : at + size] for at in range(start, len(long), size))]
    if size > len(long):
        pieces = [long]
    asked = Asked(wants_ids=False, wants_usage=False)
    _, account = fed(True, pieces, asked)
    # What comes at once is not held.
    assert ("fault" in account) is (len(pieces) > 1)
    out: list[bytes] = []
    stream = EventStream(out.append)
    for piece in pieces:
        stream.feed(piece)
    stream.end()
    assert b"".join(out) == long
