"""Both legs at once, as SGLang has them: what each is sent, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
import pytest

from hpcserve.router.pair_flight import PairFlight

from .life.test_fast_path import idle
from .stubs import Bench, Exchange, Seen, answer_with, drop, hang, sse, until

ASK: dict[str, Any] = {"model": "toy", "prompt": "a b c d", "max_tokens": 4, "temperature": 0.5}
STREAM = {**ASK, "stream": True}
MEETING = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


@pytest.fixture
def start_pairs(start):
    async def start_one(*names: str, **settings: Any):
        bench = await start(*names, **{"engine": "sglang", **settings})
        for place, name in enumerate(names):
            if name.startswith("prefill"):
                bench[name].ports = {"http": 1, "bootstrap": 8000 + place}
        bench.table()
        return bench

    return start_one


class Rooms:
    """Makes stubs wait for each other as SGLang's engines do: in a room, for as long as both are asked."""

    def __init__(self, bench: Bench) -> None:
        self._here: dict[tuple[int, str], asyncio.Event] = {}
        for name, stub in bench.stubs.items():
            role = name.partition("-")[0]
            other = "decode" if role == "prefill" else "prefill"
            stub.behave = partial(self._meet, role, other)

    async def _meet(self, role: str, other: str, exchange: Exchange, seen: Seen) -> bool:
        room = seen.body["bootstrap_room"]
        self._event(room, role).set()
        waiting = asyncio.ensure_future(self._event(room, other).wait())
        await asyncio.wait((waiting, exchange.closed), return_when=asyncio.FIRST_COMPLETED)
        met = waiting.done()
        waiting.cancel()
        return not met

    def _event(self, room: int, role: str) -> asyncio.Event:
        return self._here.setdefault((room, role), asyncio.Event())


def broken_first(message: str = "Decode transfer failed"):
    """A behaviour: SGLang's answer to a stream that fails before its first token."""

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        error = {"object": "error", "message": message, "type": "INTERNAL_SERVER_ERROR", "code": 500}
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b"data: " + msgspec.json.encode({"error": error}) + b"\n\ndata: [DONE]\n\n")
        exchange.finish()
        return True

    return behave


async def test_both_legs_are_told_where_to_meet_and_the_answer_is_decodes(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    stream = {**STREAM, "stream_options": {"include_usage": True}}
    status, headers, data = await bench.ask("/v1/completions", stream)
    assert status == 200 and "x-hpcserve-warning" not in headers
    (prefill,), (decode,) = bench["prefill-0"].seen, bench["decode-0"].seen
    meeting = {name: decode.body[name] for name in MEETING}
    assert (meeting["bootstrap_host"], meeting["bootstrap_port"]) == ("127.0.0.1", 8000)
    assert 0 <= meeting["bootstrap_room"] < 2**63
    assert prefill.body == {**ASK, **meeting}
    assert decode.body == {**stream, **meeting, "return_token_ids": True}
    *pieces, last, done = sse(data)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "a/- b/- c/- d/- "
    assert last["usage"]["prompt_tokens"] == 4 and done == "[DONE]"
    await until(
        lambda: bench.metric('hpcserve_router_kv_legs_total{result="transferred"}') == 1, "it to be counted"
    )


async def test_a_stream_is_counted_also_where_the_client_does_not_ask(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    _, _, data = await bench.ask("/v1/completions", STREAM)
    assert bench["decode-0"].seen[0].body["stream_options"] == {"include_usage": True}
    assert not {"stream_options", "return_token_ids"} & set(bench["prefill-0"].seen[0].body)
    assert [event for event in sse(data) if event != "[DONE]" and event.get("usage")] == []
    await until(lambda: bench.metric("hpcserve_router_prompt_tokens_total") == 4, "it to be counted")


async def test_a_pairs_stream_is_answered_by_callbacks_and_leaves_nothing(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    bench["decode-0"].gap = 0.05
    response = await bench.open("/v1/completions", STREAM)
    await response.next_chunk()
    assert [type(flight) for flight in bench.router.fast_path.flights] == [PairFlight]
    assert sse(await response.read(1 << 20))[-1] == "[DONE]"
    await until(lambda: idle(bench), "the end of all bookkeeping")


async def test_a_chat_is_counted_and_its_tokens_are_not_asked_for(start_pairs):
    """SGLang refuses a stream of a chat that asks for them."""
    bench = await start_pairs("prefill-0", "decode-0")
    chat = {"model": "toy", "messages": [{"role": "user", "content": "a b"}], "stream": True}
    status, _, _ = await bench.ask("/v1/chat/completions", chat)
    assert status == 200 and "return_token_ids" not in bench["decode-0"].seen[0].body
    assert bench["decode-0"].seen[0].body["stream_options"]["include_usage"] is True


async def test_each_choice_has_a_room_of_its_own(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    answer = await bench.json("/v1/completions", {**ASK, "n": 3, "seed": 1})
    assert len(answer["choices"]) == 3
    rooms = [[seen.body["bootstrap_room"] for seen in bench[name].seen] for name in ("prefill-0", "decode-0")]
    assert len(set(rooms[0])) == 3 and set(rooms[0]) == set(rooms[1])


@pytest.mark.parametrize("policy", ["kv", "round_robin"])
async def test_decode_never_computes_a_prompt_alone(start_pairs, policy):
    """However busy prefill is: the policy `kv` would leave a short prompt to an idle vLLM decode worker."""
    bench = await start_pairs("prefill-0", "decode-0", policy=policy)
    for worker in bench.router.table.with_role("prefill"):
        worker.queue.began(10_000_000, asyncio.get_running_loop().time())
    await bench.json("/v1/completions", ASK)
    assert bench["prefill-0"].seen
    bench.table("prefill-0")
    status, error = await bench.error("/v1/completions", ASK)
    assert (status, error["message"]) == (503, "no prefill replica is in rotation")
    assert len(bench["decode-0"].seen) == 1


@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize("behave", [answer_with(500), answer_with(503), answer_with(401), drop, hang])
async def test_failed_prefill_ends_the_decode_leg_and_another_pair_answers(start_pairs, behave, body):
    bench = await start_pairs("prefill-0", "prefill-1", "decode-0", first_byte_timeout=0.5)
    Rooms(bench)
    bench["prefill-1"].behave = behave
    for _ in range(2):
        status, headers, _ = await bench.ask("/v1/completions", body)
        assert status == 200 and "x-hpcserve-warning" not in headers
    assert bench.metric('hpcserve_router_retries_total{leg="pair"}') == 1
    await until(lambda: not bench["decode-0"].running, "the decode leg to end")
    await until(lambda: not bench["prefill-1"].running, "the prefill leg to end")
    assert {name for name, _ in bench.suspects} == {"prefill-1"}


@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize("behave", [answer_with(500), answer_with(503), drop])
async def test_failed_decode_ends_the_prefill_leg_and_another_pair_answers(start_pairs, behave, body):
    bench = await start_pairs("prefill-0", "decode-0", "decode-1")
    Rooms(bench)
    bench["decode-1"].behave = behave
    for _ in range(2):
        status, _, data = await bench.ask("/v1/completions", body)
        assert status == 200 and b"d/-" in data
    assert bench.metric('hpcserve_router_retries_total{leg="pair"}') == 1
    await until(lambda: not bench["prefill-0"].running, "the prefill leg to end")
    rooms = [seen.body["bootstrap_room"] for name in ("decode-0", "decode-1") for seen in bench[name].seen]
    assert len(set(rooms)) == 3


async def test_a_stream_that_begins_with_an_error_is_another_pairs(start_pairs):
    bench = await start_pairs("prefill-0", "prefill-1", "decode-0", "decode-1")
    bench["decode-1"].behave = broken_first()
    for _ in range(2):
        _, _, data = await bench.ask("/v1/completions", STREAM)
        assert b"error" not in data and b"d/-" in data
    assert bench.metric('hpcserve_router_retries_total{leg="pair"}') == 1


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_one_decode_worker_is_asked_again_with_another_prefill(start_pairs, body):
    """It answers that the KV did not come: that may be prefill's fault."""
    bench = await start_pairs("prefill-0", "prefill-1", "decode-0")

    async def nothing_from_first(exchange: Exchange, seen: Seen) -> bool:
        if seen.body["bootstrap_port"] == 8000:
            return await answer_with(500, "Decode transfer failed")(exchange, seen)
        return False

    bench["decode-0"].behave = nothing_from_first
    bench["prefill-0"].behave = hang
    for _ in range(2):
        status, _, data = await bench.ask("/v1/completions", body)
        assert status == 200 and b"d/-" in data
    await until(lambda: not bench["prefill-0"].running, "the prefill leg to end")


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_what_prefill_refuses_the_client_is_told(start_pairs, body):
    bench = await start_pairs("prefill-0", "decode-0")
    bench["prefill-0"].behave = answer_with(400, "the prompt is too long")
    bench["decode-0"].behave = hang
    status, _, data = await bench.ask("/v1/completions", body)
    assert (status, msgspec.json.decode(data)["error"]["message"]) == (400, "the prompt is too long")
    await until(lambda: not bench["decode-0"].running, "the decode leg to end")


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_what_decode_refuses_ends_the_prefill_leg(start_pairs, body):
    bench = await start_pairs("prefill-0", "decode-0")
    bench["prefill-0"].behave = hang
    bench["decode-0"].behave = answer_with(400, "max_tokens is odd")
    status, _, data = await bench.ask("/v1/completions", body)
    assert (status, msgspec.json.decode(data)["error"]["message"]) == (400, "max_tokens is odd")
    await until(lambda: not bench["prefill-0"].running, "the prefill leg to end")
    assert bench.metric('hpcserve_router_kv_legs_total{result="transferred"}') == 0


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_all_pairs_failing_is_an_error_with_sglangs_reason(start_pairs, body):
    bench = await start_pairs("prefill-0", "decode-0")

    async def refuse(exchange: Exchange, seen: Seen) -> bool:
        error = {"object": "error", "message": "Prefill bootstrap failed", "type": "500", "code": 500}
        exchange.respond(500, msgspec.json.encode(error))
        return True

    bench["prefill-0"].behave = refuse
    bench["decode-0"].behave = hang
    status, error = await bench.error("/v1/completions", body)
    assert status == 502
    assert error["message"] == "prefill-0: the engine answered 500: Prefill bootstrap failed"


@pytest.mark.parametrize("body", [ASK, STREAM, {**ASK, "n": 2}])
async def test_client_that_leaves_ends_both_legs(start_pairs, body):
    bench = await start_pairs("prefill-0", "decode-0")
    for stub in ("prefill-0", "decode-0"):
        bench[stub].behave = hang
    asking = asyncio.create_task(bench.ask("/v1/completions", body))
    await until(lambda: bench["prefill-0"].running and bench["decode-0"].running, "both legs to run")
    asking.cancel()
    await until(lambda: not bench["prefill-0"].running and not bench["decode-0"].running, "both legs to end")
    assert bench.metric('hpcserve_router_kv_legs_total{result="transferred"}') == 0


async def test_client_that_leaves_mid_stream_ends_the_decode_leg(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    bench["decode-0"].gap = 0.2
    response = await bench.open("/v1/completions", {**STREAM, "prompt": "a " * 500, "max_tokens": 500})
    await response.next_chunk()
    response.abort()
    await until(lambda: not bench["decode-0"].running, "the decode leg to end")


async def test_prefill_that_fails_after_the_answers_start_does_not_matter(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    fail = asyncio.Event()

    async def late(exchange: Exchange, seen: Seen) -> bool:
        await fail.wait()
        return await drop(exchange, seen)

    bench["prefill-0"].behave = late
    bench["decode-0"].gap = 0.05
    response = await bench.open("/v1/completions", STREAM)
    first = await response.next_chunk()
    fail.set()
    data = first + await response.read(1 << 20)
    assert sse(data)[-1] == "[DONE]" and b"error" not in data
    assert len(bench["decode-0"].seen) == 1


async def test_decode_that_dies_mid_stream_ends_it_with_an_error(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0", "decode-1")
    for name in ("decode-0", "decode-1"):
        bench[name].behave = half
    response = await bench.open("/v1/completions", STREAM)
    data = await response.read(1 << 20)
    *_, last = sse(data)
    assert b'"a "' in data and last["error"]["code"] == "worker_reset"
    assert len(bench["decode-0"].seen) + len(bench["decode-1"].seen) == 1


async def half(exchange: Exchange, seen: Seen) -> bool:
    """A behaviour: one token, then the connection breaks."""
    exchange.start(200, [(b"content-type", b"text/event-stream")])
    choice = {"index": 0, "text": "a ", "finish_reason": None}
    exchange.write(b"data: " + msgspec.json.encode({"id": "1", "choices": [choice]}) + b"\n\n")
    await exchange.drain()
    exchange.abort()
    return True


@pytest.mark.parametrize("roles", [("prefill-0", "decode-0"), ("aggregated-0",)], ids=["pair", "one"])
@pytest.mark.parametrize("name", [*MEETING, "routed_dp_rank", "disagg_prefill_dp_rank"])
async def test_client_can_not_send_engines_to_an_address_of_its_own(start_pairs, name, roles):
    bench = await start_pairs(*roles)
    for path in ("/v1/completions", "/v1/chat/completions"):
        for body in (ASK, STREAM):
            status, error = await bench.error(path, {**body, name: 1})
            assert (status, error["message"]) == (400, f"`{name}` is set by the router; leave it out")
    assert not any(bench[role].seen for role in roles)
    await bench.json("/v1/completions", {**ASK, name: None})


async def test_what_a_pair_can_not_answer_is_refused(start_pairs):
    bench = await start_pairs("prefill-0", "decode-0")
    status, error = await bench.error("/v1/completions", {**ASK, "echo": True, "logprobs": 1})
    assert status == 400 and "`echo` with `logprobs`" in error["message"]
    status, error = await bench.error("/v1/responses", {"model": "toy", "input": "x"})
    assert status == 404 and "aggregated" in error["message"]
    assert not bench["prefill-0"].seen and not bench["decode-0"].seen
    await bench.json("/v1/completions", {**ASK, "echo": True})
    await bench.json("/tokenize", {"model": "toy", "prompt": "x"})


async def test_aggregated_workers_are_asked_as_ever(start_pairs):
    bench = await start_pairs("aggregated-0")
    await bench.json("/v1/completions", {**ASK, "echo": True, "logprobs": 1})
    assert not set(MEETING) & set(bench["aggregated-0"].seen[0].body)
