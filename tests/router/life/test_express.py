"""The compiled way answers as the Python one does, to the byte, and leaves the same figures behind.

Each scenario runs on two routers, one of them without anything compiled; both meet the same engines' answers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from hpcserve.http.compiled import PURE
from hpcserve.http.exchange import Exchange
from tests.router.life.test_fast_path import event, idle
from tests.router.stubs import Bench, Seen, until

Behaviour = Callable[[Exchange, Seen], Awaitable[bool]]
ROLE = b'data: {"id":"c","object":"x","created":1,"model":"toy","prompt_token_ids":[1,2,3],'
ROLE += b'"choices":[{"index":0,'
ROLE += b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
USAGE = b'data: {"id":"c","object":"x","created":1,"model":"toy","choices":[],"usage":%b}\n\n'
COUNTS = b'{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2}'
CACHED = (
    b'{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}'
)
DONE = b"data: [DONE]\n\n"


def body(number: int, *, chat: bool = True, **more: Any) -> bytes:
    """Each prompt another one, of another length."""
    text = f"request {number} " + "word " * (number * 37 % 400)
    prompt: Any = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return msgspec.json.encode({"model": "toy", **prompt, "max_tokens": 2, "stream": True, **more})


def long(number: int, **more: Any) -> bytes:
    """What is read where it lies: from four to eighty kilobytes."""
    text = f"request {number} " + 'wörd "\\n' * 9 + "word " * (700 + number * 2900)
    return body(number, messages=[{"role": "user", "content": text}], **more)


def says(
    *pieces: bytes, status: int = 200, kind: bytes = b"text/event-stream", cut: bool = False
) -> Behaviour:
    """An engine that answers so, whatever it is asked; with `cut` it ends in the middle."""

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        if ((seen.body or {}).get("kv_transfer_params") or {}).get("do_remote_decode"):
            return False
        if len(pieces) == 1 and not cut:
            exchange.hold()
        exchange.start(status, [(b"content-type", kind), (b"x-engine", b"1"), (b"connection", b"keep-alive")])
        for piece in pieces:
            exchange.write(piece)
            if len(pieces) > 1:
                await exchange.drain()
                await asyncio.sleep(0.003)
        if cut:
            exchange.abort()
        else:
            exchange.finish()
        return True

    return behave


def stream(*, counts: bytes = COUNTS, chat: bool = True) -> list[bytes]:
    return [
        ROLE, event("a", "5", chat=chat), event("b", "6", '"length"', chat=chat), USAGE % counts, DONE,
    ]  # fmt: skip


WHOLE = [b"".join(stream())]
SCENARIOS: dict[str, tuple[Behaviour, list[bytes], str]] = {
    "whole": (says(*WHOLE), [body(n) for n in range(6)], "chat/completions"),
    "pieces": (says(*stream()), [body(n) for n in range(6)], "chat/completions"),
    "cached": (says(*stream(counts=CACHED)), [body(n) for n in range(3)], "chat/completions"),
    "wants": (
        says(*WHOLE),
        [body(n, return_token_ids=True, stream_options={"include_usage": True}) for n in range(4)],
        "chat/completions",
    ),
    "more members": (
        says(*WHOLE),
        [body(n, user="u", temperature=0.1, tools=[], seed=3, n=1) for n in range(4)],
        "chat/completions",
    ),
    "completion": (
        says(b"".join(stream(chat=False)[1:])),
        [body(n, chat=False) for n in range(4)] + [body(9, chat=False, prompt=[1, 2, 3])],
        "completions",
    ),
    "no usage": (says(b"".join([*stream()[:3], DONE])), [body(n) for n in range(4)], "chat/completions"),
    "not a stream": (
        says(b'{"a":1}', kind=b"application/json"),
        [body(n) for n in range(4)],
        "chat/completions",
    ),
    "refusal": (
        says(b'{"error":{"message":"no","code":400}}', status=400, kind=b"application/json"),
        [body(n) for n in range(4)],
        "chat/completions",
    ),
    "error event": (
        says(b'data: {"error":{"message":"no","code":400}}\n\n' + DONE),
        [body(n) for n in range(4)],
        "chat/completions",
    ),
    "failure": (says(b"x", status=503), [body(n) for n in range(2)], "chat/completions"),
    "nothing": (says(b""), [body(n) for n in range(3)], "chat/completions"),
    "cut": (says(*stream()[:2], cut=True), [body(n) for n in range(3)], "chat/completions"),
    "long": (says(*WHOLE), [long(n) for n in range(6)], "chat/completions"),
    "long in pieces": (says(*stream()), [long(n, user="u") for n in range(5)], "chat/completions"),
    "long failure": (says(b"x", status=503), [long(n) for n in range(3)], "chat/completions"),
    "long cut": (says(*stream()[:2], cut=True), [long(n) for n in range(3)], "chat/completions"),
    "long and bad": (
        says(*WHOLE),
        [long(0), long(1), long(2), long(3)[:-2], long(4)[:-1] + b"]", b"[" + long(1) + b"]",
         long(2).replace(b"word", b"wo\xffd", 1), long(2).replace(b"word", b"wo\nd", 1),
         long(2).replace(b"word", b'wo"d', 1), long(1, x=["a" * 300] * 300), long(3)],
        "chat/completions",
    ),
    "bad bodies": (
        says(*WHOLE),
        [body(1), body(2), body(3), b"{", b"[]", b"{}", b'{"stream":true}',
         b'{"stream":true,"prompt":"a","x":1e999}',
         b'{"model":3,"stream":true}', b'{"model":"other","stream":true,"prompt":"a"}',
         b'\xff{"stream":true}',
         body(4, kv_transfer_params={"a": 1}), body(5, n=2), body(6, max_tokens=-1), body(7, max_tokens=1.5),
         body(8, max_completion_tokens=3), body(9, messages=[]), body(10)],
        "chat/completions",
    ),
}  # fmt: skip
_IDS = re.compile(rb"[0-9a-f]{32}")


async def outcome(bench: Bench, scenario: str) -> dict[str, Any]:
    """What clients and engines saw, and what the router counted."""
    behave, bodies, path = SCENARIOS[scenario]
    answering = [stub for name, stub in bench.stubs.items() if not name.startswith("prefill")]
    for stub in answering:
        stub.behave = behave
    answers = []
    for one in bodies:
        try:
            status, headers, data = await bench.ask(f"/v1/{path}", one, content_type="application/json")
        except Exception as error:
            answers.append(type(error))
            continue
        named = "x-request-id" in headers
        kept = {name: value for name, value in headers.items() if name != "x-request-id"}
        answers.append((status, kept, named, _IDS.sub(b"ID", data)))
    await until(lambda: idle(bench), "the end of all bookkeeping")
    router = bench.router
    seen = [
        (stub.name, request.path, [(n, v) for n, v in request.headers if n not in (b"x-request-id", b"host")],
         request.body)
        for stub in bench.stubs.values() for request in stub.seen
    ]  # fmt: skip
    timed = re.compile(r"seconds|_bucket|rate")
    figures = [line for line in router.metrics.render().splitlines() if not timed.search(line)]
    counts = [line for line in router.metrics.render().splitlines() if "seconds_count" in line]
    decisions = [
        {key: entry[key] for key in ("user", "path", "model", "status", "retries", "migrations")}
        | {
            "decisions": [
                {k: d[k] for k in ("prefill", "cached_tokens", "uncached_tokens")} for d in entry["decisions"]
            ]
        }
        for entry in router.ring.find(limit=100)
    ]
    learned = [(m.ratio, m.answer, m.prompts, m.answers) for m in router.prompts._models.values()]
    queue = router.admission.queue
    queue.settle()
    charged = {name: cell.total for name, cell in queue._services.items()}
    return {
        "answers": answers, "seen": seen, "figures": figures, "counts": counts, "decisions": decisions,
        "meter": router.meter.take(), "learned": learned, "requests": router.requests,
        "charged": charged, "budgets": vars(router.admission.budgets)["prompt_tokens"],
    }  # fmt: skip


@pytest.mark.parametrize("roles", [("aggregated-0",), ("prefill-0", "decode-0")], ids=["one", "pair"])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_both_ways_do_the_same(start, monkeypatch, scenario, roles):
    monkeypatch.setenv(PURE, "1")
    pure = await start(*roles, policy="kv", retries=0)
    expected = await outcome(pure, scenario)
    assert pure.router.fast_path.lane is None
    monkeypatch.delenv(PURE)
    compiled = await start(*roles, policy="kv", retries=0)
    found = await outcome(compiled, scenario)
    assert compiled.router.fast_path.lane is not None
    assert found == expected


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({}, True),
        ({"connection": "keep-alive"}, True),
        ({"connection": "Keep-Alive"}, True),
        ({"connection": "keep-alive, x-own", "x_own": "1"}, False),
    ],
)
async def test_a_head_that_came_before_is_not_parsed_again(start, monkeypatch, headers, known):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = says(*WHOLE)
    # With the first request it knows whether there is a compiled way.
    assert (await bench.ask("/v1/chat/completions", body(0), **headers))[0] == 200
    taken: list[bool] = []
    whole = bench.router.fast_path.whole

    def watch(wire: Any, data: bytes) -> bool:
        taken.append(whole(wire, data))
        return taken[-1]

    monkeypatch.setattr(bench.router.fast_path, "whole", watch)
    for number in range(5):
        assert (await bench.ask("/v1/chat/completions", body(0, seed=number), **headers))[0] == 200
        sent = dict(bench["aggregated-0"].seen[-1].headers)
        assert not {b"connection", b"x-own"} & sent.keys()
    # One more is counted, the next one is learned.
    assert taken[-2:] == [known, known]


async def test_who_lost_its_key_is_refused_though_its_head_is_known(start):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = says(*WHOLE)
    for number in range(5):
        assert (await bench.ask("/v1/chat/completions", body(number)))[0] == 200
    keyring = bench.router.keyring
    keyring._run = bytes(32)
    keyring._good = {}
    assert (await bench.ask("/v1/chat/completions", body(7)))[0] == 401
