"""The compiled stream writes what `GeneratedStream` writes, and knows the same, however it is cut."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from hpcserve.http.compiled import compiled
from hpcserve.router.stream.asked import Asked
from hpcserve.router.stream.generated import EngineFault, GeneratedStream

answer = compiled("router.stream.answer", "a test")
assert answer is not None, "`make venv` compiles it, with a C compiler and Python's headers"

KNOWN = (
    "chat", "done", "events", "finished", "has_error", "head", "ids", "introduced", "marks", "pieces",
    "plain", "prompt_ids", "reached", "single", "steady", "text", "tokens", "usage", "wants_ids",
    "wants_usage", "whole",
)  # fmt: skip
HEAD = '{"id":"cmpl-1","object":"x","created":1,"model":"m",'


def choice(inner: str, reason: str = "null", more: str = "") -> bytes:
    return (
        f'data: {HEAD}"choices":[{{"index":0,{inner},"logprobs":null,"finish_reason":{reason}{more}}}]}}\n\n'
    ).encode()


def token(text: str, ids: list[int] | None, *, chat: bool, reason: str = "null") -> bytes:
    inner = f'"delta":{{"content":{json.dumps(text)}}}' if chat else f'"text":{json.dumps(text)}'
    named = "" if ids is None else f',"token_ids":{json.dumps(ids, separators=(",", ":"))}'
    return choice(inner, reason, named)


ENDS = (
    '"finish_reason":"length"', '"finish_reason":"stop","stop_reason":null', '"finish_reason":"abort"',
    '"finish_reason":"tool_calls","stop_reason":null,"prompt_token_ids":null', '"finish_reason":"stop","x":1',
    '"finish_reason":"","stop_reason":7', '"finish_reason":"Stop"', '"finish_reason":"stop" ',
)  # fmt: skip
"""Behind an answer's last text."""
USED = (
    '"prompt_tokens":3,"total_tokens":4,"completion_tokens":1',
    '"prompt_tokens":0,"total_tokens":0,"completion_tokens":0',
    '"prompt_tokens":03,"total_tokens":4,"completion_tokens":1',
    '"prompt_tokens":3,"total_tokens":4,"completion_tokens":-1',
    '"prompt_tokens":3,"total_tokens":4,"completion_tokens":123456789012345678',
    '"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}',
    '"prompt_tokens":3,"completion_tokens":1',
)
ROLE = '"delta":{"role":"assistant","content":""}'
ODD = (
    b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data:  [DONE]\r\n\r\n", b": ping\n\n", b"\n\n",
    b"event: x\ndata: {}\n\n",
    b"data: {}\n\n", b"data: {\n\n", b"data: 3\n\n", b"data: []\n\n", b'data: {"choices":3}\n\n',
    b'data: {"choices":[3]}\n\n', b'data: {"error":{"message":"no","code":400}}\n\n',
    b'data: {"error":{"message":"no","code":500}}\n\n', b'data: {"error":"what"}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n',
    b'data: {"choices":[{"text":"a","finish_reason":"abort"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3}}\r\n\r\n',
    b'data: {"prompt_token_ids":[1,2', b'data: {"token_ids":[1,2,"finish_reason":null\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[1]},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\xc3\xa9"},"finish_reason":null,"token_ids":[1,2,3]}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\xff"},"finish_reason":null}]}\n\n',
    b"data: " + b"x" * 40 + b'"finish_reason":null\n\n', b"data: {", b"\n", b"\r\n", b"\r\n\r\n",
)  # fmt: skip


TEXTS = (
    "",
    "a",
    " hello",
    "\n",
    '"',
    "\\",
    "}]",
    '"}',
    "é",
    "日本",
    "]",
    "data: ",
    "\u2028",
    "😀",
    "x" * 300,
)


def event(dice: random.Random, *, chat: bool) -> bytes:
    kind = dice.randrange(10)
    ids = [dice.randrange(200_000) for _ in range(dice.randrange(4))]
    if kind == 0:
        return dice.choice(ODD)
    if kind == 1:
        return choice(ROLE).replace(
            b'"choices"', b'"prompt_token_ids":' + json.dumps(ids).encode() + b',"choices"'
        )
    if kind == 2:
        return choice(ROLE if chat else '"text":""')
    if kind == 3 and dice.random() < 0.5:
        return f'data: {HEAD}"choices":[],"usage":{{{dice.choice(USED)}}}}}\n\n'.encode()
    if kind == 4:
        inner = f'"delta":{{"content":{json.dumps(dice.choice(TEXTS))}}}' if chat else '"text":" a"'
        named = f',"token_ids":{json.dumps(ids, separators=(",", ":"))}' if dice.random() < 0.7 else ""
        ended = f'"index":0,{inner},"logprobs":null,{dice.choice(ENDS)}{named}'
        return f'data: {HEAD}"choices":[{{{ended}}}]}}\n\n'.encode()
    of_token = dice.choice((None, ids, ids[:1] or [1]))
    return token(dice.choice(TEXTS), of_token, chat=chat, reason="null" if kind > 3 else '"stop"')


def run(made: Any, pieces: list[bytes], wants: Asked, *, chat: bool, keeps: bool) -> dict[str, Any]:
    """What it wrote, what it asked, what it raised, and what it knows after each piece."""
    written: list[bytes] = []
    told: list[bytes] = []

    def keep(ids: bytes) -> bool:
        told.append(ids)
        return keeps

    stream = made(written.append, wants, chat=chat, on_prompt_ids=keep)
    seen: list[Any] = []
    try:
        for piece in pieces:
            stream.feed(piece)
            seen.append((b"".join(written), *(getattr(stream, name) for name in KNOWN)))
        stream.end()
    except EngineFault as fault:
        seen.append((fault.message, fault.status, fault.event))
    except Exception as error:
        seen.append(type(error))
    last = [getattr(stream, name) for name in KNOWN]
    return {"written": b"".join(written), "told": told, "seen": str(seen), "last": last}


@pytest.mark.parametrize("seed", range(20))
def test_both_write_and_know_the_same(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(250):
        chat = dice.random() < 0.5
        body = b"".join(event(dice, chat=chat) for _ in range(dice.randrange(8)))
        if dice.random() < 0.3:
            # As SGLang has it.
            body = body.replace(b'"delta":{"', b'"delta":{"reasoning_content":null,"')
        if body and dice.random() < 0.3:
            at = dice.randrange(len(body))
            body = (
                body[:at]
                + dice.choice((b"", b'"', b"\\", b"\n", b"0", b"}", b",", b"\xff", b" "))
                + body[at + 1 :]
            )
        cuts = sorted(dice.randrange(len(body) + 1) for _ in range(dice.choice((0, 0, 1, 4))))
        places = [0, *cuts, len(body)]
        pieces = [body[start:end] for start, end in itertools.pairwise(places)]
        wants = Asked(wants_ids=dice.random() < 0.5, wants_usage=dice.random() < 0.5)
        keeps = dice.random() < 0.5
        ours = run(answer.AnswerStream, pieces, wants, chat=chat, keeps=keeps)
        assert ours == run(GeneratedStream, pieces, wants, chat=chat, keeps=keeps), pieces


def test_prompts_of_many_tokens_are_cut_out_whole() -> None:
    ids = b",".join(b"%d" % number for number in range(100_000))
    event = choice(ROLE).replace(b'"choices"', b'"prompt_token_ids":[' + ids + b'],"choices"')
    pieces = [event[at : at + 65_536] for at in range(0, len(event), 65_536)]
    for wants in (True, False):
        asked = Asked(wants_ids=wants)
        ours = run(answer.AnswerStream, pieces, asked, chat=True, keeps=True)
        assert ours == run(GeneratedStream, pieces, asked, chat=True, keeps=True)
        assert ours["told"] == [ids]
