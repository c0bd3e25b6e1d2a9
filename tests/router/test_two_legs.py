"""Prefill then decode: what each leg is sent, and what happens when one of them fails."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from .stubs import Exchange, Seen, answer_with, drop, hang, sse, until

ASK = {"model": "toy", "prompt": "a b c d", "max_tokens": 4, "tools": [{"x": 1}], "response_format": {}}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "a b c d"}]}


async def test_each_leg_gets_its_request_and_kv_params_are_kept_verbatim(start):
    bench = await start("prefill-0", "decode-0")
    stream = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, data = await bench.ask("/v1/completions", stream)
    assert status == 200 and "x-hpcserve-warning" not in headers
    (prefill,), (decode,) = bench["prefill-0"].seen, bench["decode-0"].seen
    assert prefill.body["max_tokens"] == 1 and prefill.body["stream"] is False
    assert prefill.body["kv_transfer_params"]["do_remote_decode"] is True
    assert decode.body == {
        **stream,
        "kv_transfer_params": {**bench["prefill-0"].kv, "do_remote_prefill": True},
    }
    *pieces, last, done = sse(data)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "a/- b/- c/- d/- "
    assert last["usage"]["prompt_tokens"] == 4 and done == "[DONE]"
    assert bench.metric('hpcserve_router_kv_legs_total{result="transferred"}') == 1


@pytest.mark.parametrize("behave", [answer_with(500), answer_with(503), answer_with(401), drop, hang])
async def test_failed_prefill_is_tried_on_another_worker(start, behave):
    bench = await start("prefill-0", "prefill-1", "decode-0", first_byte_timeout=0.3)
    bench["prefill-1"].behave = behave
    for _ in range(2):
        _, headers, _ = await bench.ask("/v1/completions", ASK)
        assert "x-hpcserve-warning" not in headers
    assert bench.metric('hpcserve_router_retries_total{leg="prefill"}') == 1
    params = [seen.body["kv_transfer_params"] for seen in bench["decode-0"].seen]
    assert {each["remote_engine_id"] for each in params} == {"prefill-0"}
    assert {name for name, _ in bench.suspects} == {"prefill-1"}
    await until(lambda: not bench["prefill-1"].running, "the prefill leg to end")


async def test_without_any_prefill_decode_computes_the_prompt_and_it_shows(start):
    bench = await start("prefill-0", "prefill-1", "decode-0")
    for stub in ("prefill-0", "prefill-1"):
        bench[stub].behave = answer_with(500)
    _, headers, _ = await bench.ask("/v1/completions", ASK)
    assert "decode replica computed the prompt" in headers["x-hpcserve-warning"]
    bench.table("prefill-0", "prefill-1")
    _, headers, _ = await bench.ask("/v1/chat/completions", CHAT)
    assert "no prefill replica is in rotation" in headers["x-hpcserve-warning"]
    assert all("kv_transfer_params" not in seen.body for seen in bench["decode-0"].seen)
    for reason in ("prefill_failed", "no_prefill_worker"):
        assert bench.metric(f'hpcserve_router_kv_legs_total{{result="local",reason="{reason}"}}') == 1


async def test_client_can_not_send_engines_to_an_address_of_its_own(start):
    bench = await start("prefill-0", "decode-0")
    params = {"do_remote_prefill": True, "remote_host": "evil", "remote_port": 1}
    asks = [
        ("/v1/completions", {**ASK, "kv_transfer_params": params}),
        ("/v1/chat/completions", {**CHAT, "n": 2, "kv_transfer_params": params}),
        ("/v1/responses", {"input": "x", "kv_transfer_params": params}),
        ("/v1/responses", b'{"kv_transfer_params": {"a": 1}, "input": NaN}'),
        ("/v1/responses", b'{"kv\\u005ftransfer_params": {"a": 1}}'),
        ("/v1/responses", {"input": "x", "vllm_xargs": {"kv_transfer_params": ""}}),
        ("/v1/completions", {**ASK, "echo": True, "vllm_xargs": {"ec_transfer_params": []}}),
        ("/v1/completions", {**ASK, "ec_transfer_params": {}}),
    ]
    for path, body in asks:
        status, error = await bench.error(path, body)
        assert (status, error["type"]) == (400, "invalid_request_error")
    assert not bench["prefill-0"].seen and not bench["decode-0"].seen
    await bench.json("/v1/completions", {**ASK, "kv_transfer_params": None})


async def test_chat_that_echoes_skips_prefill(start):
    """vLLM computes the prompt's logprobs for it, which needs the prompt itself."""
    bench = await start("prefill-0", "decode-0")
    await bench.json("/v1/chat/completions", {**CHAT, "echo": True})
    assert not bench["prefill-0"].seen
    await bench.json("/v1/completions", {**ASK, "echo": True})
    assert bench["prefill-0"].seen


async def test_prefill_that_kept_no_kv_is_told(start):
    bench = await start("prefill-0", "decode-0")
    bench["prefill-0"].kv = None
    _, headers, _ = await bench.ask("/v1/completions", ASK)
    assert "kept no KV" in headers["x-hpcserve-warning"]
    assert "kv_transfer_params" not in bench["decode-0"].seen[0].body


async def test_what_prefill_refuses_decode_refuses_in_its_own_words(start):
    bench = await start("prefill-0", "decode-0")
    bench["prefill-0"].behave = answer_with(400, "max_tokens=1 is odd")
    bench["decode-0"].behave = answer_with(400, "the prompt is too long")
    status, _, data = await bench.ask("/v1/completions", ASK)
    assert (status, msgspec.json.decode(data)["error"]["message"]) == (400, "the prompt is too long")
    bench["prefill-0"].behave = answer_with(429, "busy")
    assert (await bench.ask("/v1/completions", ASK))[0] == 429
    assert len(bench["decode-0"].seen) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 0},
        {"echo": True, "max_tokens": 0},
        {"use_beam_search": True},
    ],
)
async def test_what_needs_the_prompt_itself_skips_prefill(start, fields):
    bench = await start("prefill-0", "decode-0")
    _, headers, _ = await bench.ask("/v1/completions", {**ASK, **fields})
    assert not bench["prefill-0"].seen and "x-hpcserve-warning" not in headers


@pytest.mark.parametrize("behave", [answer_with(500), answer_with(503), drop, hang])
async def test_failed_decode_gets_a_new_prompt_on_another_worker(start, behave):
    """The failed one may have pulled the blocks, which frees them on the prefill worker."""
    bench = await start("prefill-0", "decode-0", "decode-1", first_byte_timeout=0.3)
    bench["decode-1"].behave = behave
    for _ in range(2):
        assert (await bench.ask("/v1/completions", {**ASK, "stream": True}))[0] == 200
    assert len(bench["prefill-0"].seen) == 3
    assert bench.metric('hpcserve_router_retries_total{leg="decode"}') == 1


async def test_decode_that_never_got_the_request_leaves_the_prompt_usable(start):
    bench = await start("prefill-0", "decode-0", "decode-1")
    await bench["decode-1"].stop()
    for _ in range(2):
        await bench.json("/v1/completions", ASK)
    assert len(bench["prefill-0"].seen) == 2


async def test_prompt_older_than_half_its_lease_is_computed_again(start):
    bench = await start("prefill-0", "decode-0", "decode-1", kv_lease=0.000001)
    await bench["decode-1"].stop()
    for _ in range(2):
        await bench.json("/v1/completions", ASK)
    assert len(bench["prefill-0"].seen) == 3


async def test_all_decode_workers_failing_is_an_error_with_the_reason(start):
    bench = await start("prefill-0", "decode-0", "decode-1", retries=1)
    for name in ("decode-0", "decode-1"):
        bench[name].behave = drop
    status, error = await bench.error("/v1/completions", ASK)
    assert (status, error["code"]) == (502, "worker_reset")
    assert "decode-" in error["message"]


@pytest.mark.parametrize("where", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("n", [1, 3])
async def test_client_that_leaves_ends_both_legs(start, where, n):
    bench = await start("prefill-0", "decode-0")
    bench[where].behave = hang
    asking = asyncio.create_task(bench.ask("/v1/chat/completions", {**CHAT, "n": n}))
    await until(lambda: bench[where].running == n, "the leg")
    asking.cancel()
    await until(lambda: not bench[where].running, "the leg's end")
    await until(lambda: not bench.router.in_flight, "the request's end")
    assert all(seen.gone for seen in bench[where].seen)
    assert bench.metric('hpcserve_router_cancelled_total{route="/v1/chat/completions"}') == 1
    assert not any(worker.in_flight for worker in bench.router.table.all())


@pytest.mark.parametrize("n", [1, 2])
async def test_client_that_leaves_mid_stream_ends_the_decode_leg(start, n):
    bench = await start("prefill-0", "decode-0")

    async def endless(exchange: Exchange, seen: Seen) -> bool:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        while not exchange.closed.done():
            exchange.write(b'data: {"id": "x", "choices": [{"index": 0, "text": "a"}]}\n\n')
            await asyncio.sleep(0.001)
        return True

    bench["decode-0"].behave = endless
    response = await bench.open("/v1/completions", {**ASK, "stream": True, "n": n})
    await response.next_chunk()
    response.abort()
    await until(lambda: len(bench["decode-0"].seen) == n and not bench["decode-0"].running, "the leg's end")
