"""Which paths reach an engine, what every answer has, and how each API's clients hear of errors."""

from __future__ import annotations

import msgspec
import pytest

from hpcserve.router import routes

from ..stubs import KEY, Exchange, Seen

ASK = {"model": "toy", "prompt": "a b c d"}
FORBIDDEN = [
    "/sleep", "/sleep?level=2", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/invocations", "/server_info", "/pause", "/resume",
    "/abort_requests", "/scale_elastic_ep", "/start_profile", "/update_weights", "/kv_event_sources", "/load",
    "/inference/v1/generate", "/fault_tolerance/apply", "/fake/fail", "/docs", "/openapi.json", "/",
    # and the ways around a list
    "/v1//load_lora_adapter", "/v1/./load_lora_adapter", "/v1/%6coad_lora_adapter", "/V1/load_lora_adapter",
    "/v1/responses/..", "/v1/responses/../load_lora_adapter", "/v1/responses/%2e%2e", "/v1/responses/a/b",
    "/v1/responses/a/cancel/", "/v1/responses/a%2f..%2f..%2fsleep", "/v1/chat/completions/", "//sleep",
    "/v1/models/../load_lora_adapter/x?y", "/v1/responses/;/sleep",
]  # fmt: skip
FORWARDED = [route for route in routes._ROUTES if route.kind != "own" and route.body == "json"]


@pytest.mark.parametrize("path", FORBIDDEN)
async def test_routes_that_steer_an_engine_reach_none(start, path):
    bench = await start("aggregated-0")
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, _, _ = await bench.ask(path, b"{}" if method != "GET" else None, method=method)
        assert status in (400, 404, 405)
    assert not bench["aggregated-0"].seen


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
async def test_what_an_engine_offers_passes_through_with_its_query(start, route):
    bench = await start("aggregated-0", "aggregated-1")
    raw = b'{"model":"toy", "prompt": "a", "input": ["\\u00e9"], "messages": [{"role":"user","content":"x"}]}'
    status, _, _ = await bench.ask(f"{route.path}?beta=true", raw)
    assert status == 200
    (seen,) = [seen for stub in bench.stubs.values() for seen in stub.seen]
    assert (seen.path, seen.raw) == (route.path, raw)


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
async def test_no_route_lets_a_client_say_where_kv_blocks_are(start, route):
    bench = await start("aggregated-0")
    body = {**ASK, "kv_transfer_params": {"remote_host": "10.0.0.1"}}
    status, _, data = await bench.ask(route.path, body)
    assert status == 400 and b"kv_transfer_params" in data
    assert not bench["aggregated-0"].seen


async def test_on_prefill_and_decode_other_apis_run_on_decode_visibly(start):
    bench = await start("prefill-0", "decode-0")
    for path in ("/v1/responses", "/v1/messages", "/v1/chat/completions/batch"):
        _, headers, _ = await bench.ask(path, {"model": "toy", "messages": [], "input": "hi"})
        assert "decode replica computed the prompt" in headers["x-hpcserve-warning"]
    assert bench.metric('hpcserve_router_kv_legs_total{result="local",reason="route"}') == 3
    _, headers, _ = await bench.ask("/tokenize", {"prompt": "hi"})
    assert "x-hpcserve-warning" not in headers
    for path in ("/v1/rerank", "/score", "/pooling", "/classify"):
        status, error = await bench.error(path, {"model": "toy"})
        assert (status, error["code"]) == (404, "not_available")
    assert not bench["prefill-0"].seen


@pytest.mark.parametrize("name", ["x-request-id", "x-correlation-id", "request-id", "x-trace-id"])
@pytest.mark.parametrize(
    "engines", [("aggregated-0",), ("prefill-0", "decode-0")], ids=["one leg", "two legs"]
)
async def test_request_id_under_any_of_its_names_is_on_every_answer_and_leg(start, engines, name):
    bench = await start(*engines)
    given = {name.replace("-", "_"): "my-id.7"}
    asked = [
        ("POST", "/v1/completions", ASK), ("POST", "/v1/completions", {**ASK, "stream": True}),
        ("POST", "/v1/completions", b"{"), ("POST", "/v1/messages", {"model": "no"}), ("GET", "/nope", None),
        ("GET", "/v1/models", None), ("GET", "/metrics", None), ("GET", "/health", None),
        ("GET", "/v1/hpcserve/decisions", None), ("OPTIONS", "/v1/completions", None),
        ("GET", "/v1/completions", None),
    ]  # fmt: skip
    for method, path, body in asked:
        _, headers, _ = await bench.ask(path, body, method=method, **given)
        assert headers["x-request-id"] == "my-id.7", path
    _, headers, _ = await bench.ask("/v1/completions", ASK, key=None, **given)
    assert headers["x-request-id"] == "my-id.7"
    for stub in bench.stubs.values():
        assert {seen.header(b"x-request-id") for seen in stub.seen} == {b"my-id.7"}


async def test_first_usable_name_of_a_request_counts(start):
    bench = await start("aggregated-0")
    _, headers, _ = await bench.ask(
        "/v1/models", method="GET", x_request_id="not usable", x_correlation_id="c-1", x_trace_id="t-1"
    )
    assert headers["x-request-id"] == "c-1"


async def test_trace_context_reaches_both_legs_as_it_came(start):
    bench = await start("prefill-0", "decode-0")
    parent, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "rojo=1,congo=2"
    await bench.json("/v1/completions", ASK, traceparent=parent, tracestate=state)
    for stub in bench.stubs.values():
        (seen,) = stub.seen
        assert (seen.header(b"traceparent"), seen.header(b"tracestate")) == (parent.encode(), state.encode())


async def test_no_client_key_reaches_an_engine(start):
    bench = await start("aggregated-0")
    status, _, _ = await bench.ask("/v1/messages", {"model": "toy"}, key=None, x_api_key=KEY)
    assert status == 200
    (seen,) = bench["aggregated-0"].seen
    assert KEY.encode() not in b" ".join(value for _, value in seen.headers)


async def test_head_and_options_are_answered_without_an_engine(start):
    bench = await start("aggregated-0")
    status, headers, data = await bench.ask("/v1/models", method="HEAD")
    assert status == 200 and int(headers["content-length"]) > 0 and data == b""
    status, headers, _ = await bench.ask("/v1/completions", method="OPTIONS")
    assert (status, headers["allow"]) == (204, "OPTIONS, POST")
    assert not [name for name in headers if name.startswith("access-control")]
    status, headers, _ = await bench.ask("/v1/completions", method="HEAD")
    assert (status, headers["allow"]) == (405, "OPTIONS, POST")
    assert not bench["aggregated-0"].seen


async def test_errors_have_the_form_of_the_api_that_was_asked(start):
    bench = await start("aggregated-0")
    cases = [
        ({"model": "no"}, {}, 404, "not_found_error"), (b"{", {}, 400, "invalid_request_error"),
        ({"model": "toy"}, {"key": "wrong"}, 401, "authentication_error"),
        (None, {"method": "GET"}, 405, "invalid_request_error"),
    ]  # fmt: skip
    for body, how, status, kind in cases:
        got, headers, data = await bench.ask("/v1/messages", body, **how)
        told = msgspec.json.decode(data)
        assert (got, told["type"], told["error"]["type"]) == (status, "error", kind)
        assert told["request_id"] == headers["request-id"] == headers["x-request-id"]
        got, error = await bench.error("/v1/responses", body, **how)
        assert (got, error["type"]) == (status, kind)
    bench.table(state="draining", reason="the walltime ends")
    _, headers, data = await bench.ask("/v1/messages", {"model": "toy"})
    assert msgspec.json.decode(data)["error"] == {"type": "overloaded_error", "message": "the walltime ends"}
    assert headers["x-hpcserve-reason"] == "draining"
    assert bench.metric('hpcserve_router_requests_shed_total{reason="draining"}') == 1


async def test_stored_response_is_found_on_the_worker_that_wrote_it(start):
    bench = await start("aggregated-0", "aggregated-1", "aggregated-2")
    stored: dict[str, set[str]] = {name: set() for name in bench.stubs}

    def keeper(name: str):
        async def behave(exchange: Exchange, seen: Seen) -> bool:
            held = exchange.path.removeprefix("/v1/responses").strip("/").removesuffix("/cancel")
            if seen.method == "POST" and not held:
                held = f"resp_{name}_{len(stored[name])}"
                stored[name].add(held)
            elif held not in stored[name]:
                exchange.respond(404, b'{"error": {"message": "not here"}}')
                return True
            exchange.respond(200, msgspec.json.encode({"id": held, "by": name}))
            return True

        return behave

    for name, stub in bench.stubs.items():
        stub.behave = keeper(name)
    ids = [(await bench.json("/v1/responses", {"model": "toy", "input": "x"}))["id"] for _ in range(6)]
    assert len({held.split("_")[1] for held in ids}) == 3
    bench.router._holders._workers.clear()  # as in another process, or after a restart
    for held in ids:
        assert (await bench.json(f"/v1/responses/{held}", method="GET"))["by"] == held.split("_")[1]
        assert (await bench.json(f"/v1/responses/{held}/cancel"))["by"] == held.split("_")[1]
    status, _, data = await bench.ask("/v1/responses/resp_none", method="GET")
    assert status == 404 and b"not here" in data
