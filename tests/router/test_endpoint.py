"""Routes, keys, limits and states: what is let in, and how the rest is refused."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .stubs import JOB_KEY, Exchange, Seen

ASK = {"model": "toy", "prompt": "a b c d"}
ENGINES = {"one leg": ("aggregated-0",), "two legs": ("prefill-0", "decode-0")}


@pytest.mark.parametrize("key", [None, "wrong", "sk-clien", "sk-client2"])
async def test_no_route_but_health_works_without_the_key(start, key):
    bench = await start("aggregated-0")
    for method, path in [
        ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/tokenize"),
        ("POST", "/v1/anything"),
    ]:  # fmt: skip
        status, error = await bench.error(path, b"{}" if method == "POST" else None, key=key, method=method)
        assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
    assert not bench["aggregated-0"].seen
    assert (await bench.ask("/health", method="GET", key=key))[0] == 200


async def test_engines_get_the_job_key_and_never_the_clients(start):
    bench = await start("prefill-0", "decode-0")
    await bench.json("/v1/completions", ASK)
    for name in ("prefill-0", "decode-0"):
        (seen,) = bench[name].seen
        assert seen.header(b"authorization") == f"Bearer {JOB_KEY}".encode()
        assert b"sk-client" not in b" ".join(value for _, value in seen.headers)


async def test_models_and_metrics_are_the_routers_own(start):
    bench = await start("aggregated-0")
    models = await bench.json("/v1/models", method="GET")
    assert [model["id"] for model in models["data"]] == ["toy"]
    await bench.json("/v1/completions", ASK)
    status, headers, text = await bench.ask("/metrics", method="GET")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert b'hpcserve_router_requests_total{route="/v1/completions",status="200"} 1' in text
    assert b"hpcserve_router_e2e_request_latency_seconds_count 1" in text
    assert b'hpcserve_router_worker_in_flight{worker="aggregated-0",role="aggregated"} 0' in text


async def test_metrics_are_what_prometheus_reads_in_every_state(start):
    bench = await start("prefill-0", "decode-0")
    await bench.ask("/v1/completions", {**ASK, "stream": True})
    for state, ready in [("ready", 1.0), ("starting", 0.0)]:
        bench.table(state=state, reason='odd "reason"\n')
        _, _, text = await bench.ask("/metrics", method="GET")
        families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        assert families["hpcserve_router_ready"].samples[0].value == ready
    assert families["hpcserve_router_time_to_first_token_seconds"].type == "histogram"
    assert all(name.startswith("hpcserve_router_") for name in families)


async def test_only_streams_have_a_time_to_first_token(start):
    bench = await start("prefill-0", "decode-0")
    for n in (1, 2):
        for stream in (False, True):
            await bench.ask("/v1/completions", {**ASK, "n": n, "stream": stream})
    assert bench.metric("hpcserve_router_time_to_first_token_seconds_count") == 2
    assert bench.metric("hpcserve_router_e2e_request_latency_seconds_count") == 4


async def test_workers_that_left_leave_no_metric_behind(start):
    bench = await start("aggregated-0")
    for generation in range(20):
        spec = bench["aggregated-0"].spec
        bench.router.table.update([msgspec.structs.replace(spec, name=f"aggregated-{generation}")])
        await bench.json("/v1/completions", ASK)
    text = await bench.router.own.metrics_text()
    lines = [line for line in text.splitlines() if "worker=" in line]
    assert 'hpcserve_router_worker_in_flight{worker="aggregated-19",role="aggregated"} 0' in lines
    assert all('worker="aggregated-19"' in line for line in lines)


async def test_unknown_model_names_the_served_one(start):
    bench = await start("aggregated-0")
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        status, error = await bench.error(path, {"model": "gpt-4", "prompt": "x"})
        assert (status, error["code"]) == (404, "model_not_found")
        assert "toy" in error["message"]


async def test_unknown_route_and_wrong_method(start):
    bench = await start("aggregated-0")
    assert (await bench.error("/nope", method="GET"))[0] == 404
    assert (await bench.error("/v1/completions", method="GET"))[0] == 405
    assert (await bench.error("/v1/models", b"{}"))[0] == 405


BAD_BODIES = {
    "empty": (b"", 400),
    "not JSON": (b"{", 400),
    "not an object": (b"[1]", 400),
    "invalid UTF-8": (b'{"model": "toy", "prompt": "\xff\xfe"}', 400),
    "UTF-16": ('{"model": "toy"}'.encode("utf-16"), 400),
    "half a surrogate": (b'{"prompt": "\\ud800"}', 400),
    "NaN": (b'{"temperature": NaN}', 400),
    "a number out of range": (b'{"temperature": 1e999}', 400),
    "deep lists": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    "too large": (b'{"prompt": "' + b"x" * 2_000_000 + b'"}', 413),
}


@pytest.mark.parametrize("body, status", BAD_BODIES.values(), ids=BAD_BODIES)
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
async def test_bad_body_is_refused_before_any_engine_sees_it(start, body, status, engines):
    bench = await start(*engines, max_body=1_000_000)
    got, error = await bench.error("/v1/completions", body)
    assert (got, error["type"]) == (status, "invalid_request_error")
    assert not any(stub.seen for stub in bench.stubs.values())
    await bench.json("/v1/completions", ASK)


async def test_json_just_below_the_depth_limit_does_not_crash_when_written_again(start):
    bench = await start("prefill-0", "decode-0")
    for depth in (400, 900, 950, 970, 980, 990, 995, 1000):
        body = b'{"model": "toy", "prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}"
        assert (await bench.ask("/v1/completions", body))[0] in (200, 400)


async def test_compressed_body_is_refused(start):
    bench = await start("aggregated-0")
    assert (await bench.error("/v1/completions", b"\x1f\x8b", content_encoding="gzip"))[0] == 415


async def test_request_id_is_honoured_and_comes_back_on_every_answer(start):
    bench = await start("prefill-0", "decode-0")
    for path, body in [("/v1/completions", ASK), ("/v1/completions", {"model": "no"}), ("/nope", b"")]:
        _, headers, _ = await bench.ask(path, body, x_request_id="my-id.1")
        assert headers["x-request-id"] == "my-id.1"
    ids = {name: bench[name].seen[0].header(b"x-request-id") for name in bench.stubs}
    assert set(ids.values()) == {b"my-id.1"}
    for bad in ("a b", "x" * 300, "\u00e9", "a\tb", ""):
        _, headers, _ = await bench.ask("/v1/models", method="GET", x_request_id=bad)
        assert headers["x-request-id"] not in (bad, "")


async def test_hop_by_hop_headers_stay_between_client_and_router(start):
    bench = await start("aggregated-0")
    await bench.ask(
        "/v1/completions", ASK, connection="keep-alive, x-private", x_private="1", te="trailers",
        x_kept="yes", accept_encoding="gzip",
    )  # fmt: skip
    (seen,) = bench["aggregated-0"].seen
    names = [name for name, _ in seen.headers]
    assert b"x-kept" in names
    assert not {b"x-private", b"te", b"connection", b"accept-encoding"} & set(names)
    assert names.count(b"host") == 1


async def test_aggregated_engine_gets_the_clients_bytes(start):
    bench = await start("aggregated-0")
    raw = b'{ "model":"toy" ,\n "prompt": "\\u00e9 a b", "seed": 1.0, "x": 1e2, "x": 3 }'
    await bench.ask("/v1/completions", raw)
    assert bench["aggregated-0"].seen[0].raw == raw


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
async def test_client_gets_the_engines_bytes(start, engines, stream):
    bench = await start(*engines)
    odd = b'data: {"a" :1}\n\n: comment\n\ndata: {\r\n\r\nevent: x\ndata: \xff\xfe\n\n\n\ndata: tail'
    plain = b'{"a" : 1.50}\n'

    async def behave(exchange: Exchange, seen: Seen) -> bool:
        if (seen.body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            return False
        if not stream:
            exchange.respond(200, plain, headers=[(b"x-engine", b"1")])
            return True
        exchange.start(200, [(b"content-type", b"text/event-stream"), (b"x-engine", b"1")])
        for at in range(len(odd)):
            exchange.write(odd[at : at + 1])
        exchange.finish()
        return True

    bench[engines[-1]].behave = behave
    status, headers, data = await bench.ask("/v1/completions", {**ASK, "stream": stream})
    assert (status, headers["x-engine"], data) == (200, "1", odd if stream else plain)


async def test_engines_refusal_comes_back_as_it_is(start):
    bench = await start("aggregated-0", "aggregated-1")

    async def refuse(exchange: Exchange, seen: Seen) -> bool:
        body = b'{"error": {"message": "too long", "vllm": 1}}'
        exchange.respond(429, body, headers=[(b"retry-after", b"7")])
        return True

    for stub in bench.stubs.values():
        stub.behave = refuse
    status, headers, data = await bench.ask("/v1/completions", ASK)
    assert (status, headers["retry-after"]) == (429, "7")
    assert data == b'{"error": {"message": "too long", "vllm": 1}}'
    assert sum(len(stub.seen) for stub in bench.stubs.values()) == 1


async def test_embeddings_need_aggregated_replicas(start):
    bench = await start("prefill-0", "decode-0")
    status, error = await bench.error("/v1/embeddings", {"model": "toy", "input": "x"})
    assert status == 404 and "aggregated" in error["message"]
    other = await start("aggregated-0")
    assert (await other.json("/v1/embeddings", {"model": "toy", "input": "x"}))["path"] == "/v1/embeddings"


async def test_other_routes_pass_through_untouched(start):
    bench = await start("prefill-0", "decode-0")
    answer = await bench.json("/v1/responses?x=1", b'{"input": "hi"}')
    assert answer == {"path": "/v1/responses", "body": {"input": "hi"}}
    assert (await bench.json("/tokenize", {"prompt": "hi"}))["path"] == "/tokenize"
    assert (await bench.json("/v1/responses/resp_7", method="GET"))["path"] == "/v1/responses/resp_7"
    assert not bench["prefill-0"].seen


async def test_states_are_told_by_health_and_by_refusals(start):
    bench = await start("aggregated-0")
    for state, reason in [("starting", "engines are loading (1/2)"), ("draining", "the walltime ends")]:
        bench.table(state=state, reason=reason, retry_after=33, end_time=123.0)
        status, headers, data = await bench.ask("/v1/completions", ASK)
        error = msgspec.json.decode(data)["error"]
        assert (status, headers["retry-after"], error["message"]) == (503, "33", reason)
        status, _, data = await bench.ask("/health", method="GET")
        assert status == 503 and msgspec.json.decode(data)["reason"] == reason
    assert not bench["aggregated-0"].seen


async def test_no_worker_is_a_503_that_says_so(start):
    bench = await start("aggregated-0")
    bench.table("aggregated-0")
    status, error = await bench.error("/v1/completions", ASK)
    assert (status, error["code"]) == (503, "no_worker")
    assert (await bench.ask("/health", method="GET"))[0] == 503


async def test_metric_labels_do_not_grow_with_paths(start):
    bench = await start("aggregated-0")
    for i in range(50):
        await bench.ask(f"/v1/x{i}", method="GET")
    text = await bench.router.own.metrics_text()
    lines = [line for line in text.splitlines() if line.startswith("hpcserve_router_requests_total{")]
    assert lines == ['hpcserve_router_requests_total{route="other",status="404"} 50']
