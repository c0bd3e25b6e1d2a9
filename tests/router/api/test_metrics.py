"""The router's figures: what Prometheus reads, what they count, and how several processes' make one."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from hpcserve.router.metrics import MOST_CHILDREN, Counter, Gauge, Metrics

ASK = {"model": "toy", "prompt": "a b c d"}
EXPECTED = {
    "requests", "errors", "retries", "cancelled", "requests_shed", "kv_legs", "broken_streams", "migrations",
    "prompt_tokens", "cached_tokens", "predicted_cached_tokens", "generation_tokens", "key_requests",
    "key_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_time_per_output_token_seconds", "request_queue_time_seconds", "decision_seconds",
    "prefix_hit_rate", "ready", "in_flight", "worker_in_flight", "worker_state", "queued", "info",
    "kv_transfer_bytes", "kv_transfer_seconds", "kv_index_entries", "process_resident_memory_bytes",
    "process_cpu_seconds",
}  # fmt: skip


def families(text: str):
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in found, f"{family.name} is there twice"
        found[family.name] = family
    return found


def value(found, name: str, **labels: str) -> float:
    samples = [s for family in found.values() for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


async def metrics(bench, **how):
    status, headers, text = await bench.ask("/metrics" + how.pop("query", ""), method="GET", **how)
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    return families(text.decode())


async def test_every_figure_is_valid_and_has_a_help_text_and_no_sample_twice(start):
    bench = await start("prefill-0", "decode-0")
    await bench.ask("/v1/completions", {**ASK, "stream": True})
    await bench.ask("/v1/completions", ASK)
    found = await metrics(bench)
    assert {f"hpcserve_router_{name}" for name in EXPECTED} <= found.keys()
    for family in found.values():
        assert family.documentation.endswith(".")
        seen = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert len(seen) == len(set(seen))
    for family in found.values():
        if family.type == "histogram":
            counts = [s.value for s in family.samples if s.name.endswith("_bucket")]
            assert counts == sorted(counts)
            assert counts[-1] == value(found, family.name + "_count")


async def test_tokens_are_the_engines_own_count(start):
    bench = await start("aggregated-0")
    await bench.json("/v1/completions", ASK)
    await bench.ask("/v1/completions", {**ASK, "stream": True})
    found = await metrics(bench)
    assert value(found, "hpcserve_router_prompt_tokens_total") == 8
    assert value(found, "hpcserve_router_generation_tokens_total") == 6
    assert value(found, "hpcserve_router_key_tokens_total", key="run", kind="completion") == 6
    assert value(found, "hpcserve_router_key_requests_total", key="run") == 2
    assert value(found, "hpcserve_router_decision_seconds_count") == 2
    # Three events of one stream are two gaps.
    assert value(found, "hpcserve_router_inter_token_latency_seconds_count") == 2
    assert value(found, "hpcserve_router_request_time_per_output_token_seconds_count") == 1


async def test_hit_rate_compares_what_was_measured_with_what_was_expected():
    metrics = Metrics()
    metrics.prompt_tokens.child().inc(200)
    metrics.reported_tokens.child().inc(100)
    metrics.cached_tokens.child().inc(50)
    metrics.predicted_tokens.child().inc(60)
    found = families(metrics.render())
    assert value(found, "hpcserve_router_prefix_hit_rate", of="measured") == 0.5
    assert value(found, "hpcserve_router_prefix_hit_rate", of="predicted") == 0.3


async def test_each_worker_has_one_state(start):
    bench = await start("aggregated-0", "aggregated-1")
    worker = bench.router.table.get("aggregated-1")
    import asyncio

    worker.breaker.failed(asyncio.get_running_loop().time())
    found = await metrics(bench)
    name = "hpcserve_router_worker_state"
    assert value(found, name, worker="aggregated-0", state="up") == 1
    assert value(found, name, worker="aggregated-1", state="breaker_open") == 1
    assert value(found, name) == 2


async def test_names_of_one_engine_are_there_for_who_asks(start):
    bench = await start("aggregated-0")
    await bench.ask("/v1/completions", {**ASK, "stream": True})
    assert not any(name.startswith("vllm:") for name in await metrics(bench))
    found = await metrics(bench, query="?aliases=vllm")
    assert value(found, "vllm:time_to_first_token_seconds_count") == 1
    assert value(found, "vllm:generation_tokens_total") == 3
    assert value(found, "vllm:num_requests_running") == 0


async def test_figures_of_several_processes_add_up(start):
    first, second = await start("aggregated-0"), await start("aggregated-0")
    for bench, count in ((first, 2), (second, 3)):
        for _ in range(count):
            await bench.json("/v1/completions", ASK)
    # What one relay sends another crosses two lines of JSON.
    told = msgspec.json.decode(msgspec.json.encode(second.router.snapshot()))

    async def others(query):
        return [told]

    first.router.own._others = others
    found = await metrics(first)
    route = {"route": "/v1/completions", "status": "200"}
    assert value(found, "hpcserve_router_requests_total", **route) == 5
    assert value(found, "hpcserve_router_prompt_tokens_total") == 20
    assert value(found, "hpcserve_router_e2e_request_latency_seconds_count") == 5
    assert value(found, "hpcserve_router_processes") == 2
    assert value(found, "hpcserve_router_ready") == 1
    # Reading them has not changed them.
    assert first.metric("hpcserve_router_prompt_tokens_total") == 8


def test_label_sets_are_bounded():
    counter = Counter("x_total", "X.")
    for number in range(MOST_CHILDREN + 500):
        counter.add(("key", f"k{number}"))
    assert len(counter.snapshot()) == MOST_CHILDREN + 1
    assert dict(counter.snapshot())[("key", "other"),] == 500
    assert counter.total == MOST_CHILDREN + 500


def test_odd_label_values_survive():
    odd = 'a "b" \\ c\nd é'
    gauge = Gauge("x", "X.", {(("reason", odd),): 1})
    (family,) = text_string_to_metric_families(
        Metrics().render([gauge]).split("# HELP x ")[1].join(["# HELP x ", ""])
    )
    assert family.samples[0].labels == {"reason": odd}
