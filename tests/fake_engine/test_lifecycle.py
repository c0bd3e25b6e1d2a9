"""Start, key, queues, disconnecting clients, metrics, drain."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import requests

from hpcserve.engines.fake import Fake

from .conftest import Start
from .running import DEADLINE, FakeEngine, wait_until

LONG = {"prompt": "x", "max_tokens": 30_000, "stream": True}


def test_loading_is_reported_and_nothing_answers_before_it_is_done(start: Start) -> None:
    engine = start("--start-delay", "0.4")
    assert engine.get("/health").status_code == 200
    progress = [step for line in engine.output.splitlines() if (step := Fake().progress(line))]
    assert progress == [f"weights {shard}/4" for shard in range(5)]
    assert engine.output.index("100% Completed") < engine.output.index("Application startup complete.")


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/load", "/kv_event_sources"])
def test_with_a_key_no_path_is_open(start: Start, path: str) -> None:
    engine = start(key="secret")
    assert engine.get(path).status_code == 200
    assert requests.get(engine.url + path, timeout=DEADLINE).status_code == 401
    wrong = {"authorization": "Bearer wrong"}
    assert requests.post(engine.url + "/fake/fail", headers=wrong, timeout=DEADLINE).status_code == 401
    assert "secret" not in engine.output


def test_sequences_beyond_max_num_seqs_wait(start: Start) -> None:
    engine = start("--max-num-seqs", "2")
    streams = [engine.post("/v1/completions", LONG, stream=True) for _ in range(3)]
    wait_until(lambda: engine.metric("vllm:num_requests_waiting") == 1, "one to wait")
    assert engine.metric("vllm:num_requests_running") == 2
    assert engine.metric("vllm:num_requests_waiting_by_reason", reason="capacity") == 1
    assert engine.get("/load").json() == {"server_load": 3}
    for stream in streams:
        stream.close()
    wait_until(lambda: engine.metric("vllm:num_requests_waiting") == 0, "all to be gone")


def test_a_client_that_goes_away_stops_its_sequences_at_once(start: Start) -> None:
    engine = start("--itl-ms", "10000")
    with engine.post("/v1/completions", {**LONG, "n": 2}, stream=True):
        wait_until(lambda: engine.metric("vllm:num_requests_running") == 2, "both samples to run")
    wait_until(lambda: engine.metric("vllm:num_requests_running") == 0, "both samples to stop")
    assert engine.metric("vllm:request_success_total", finished_reason="abort") == 2
    assert engine.metric("vllm:kv_cache_usage_perc") == 0


def test_prefill_takes_time_for_uncached_tokens_only(start: Start) -> None:
    engine = start("--prefill-tokens-per-second", "2000", "--max-num-batched-tokens", "256")
    name = "vllm:request_prefill_time_seconds_sum"
    engine.complete([1] * 1024, max_tokens=1)
    first = engine.metric(name)
    # 1024 tokens need 0.512 s, less what the simulated clock may have to catch up.
    assert first > 0.45
    engine.complete([1] * 1040, max_tokens=1)
    assert engine.metric("vllm:prefix_cache_hits_total") == 1024
    assert engine.metric("vllm:iteration_tokens_total_sum") == 1040


@pytest.mark.parametrize("role", ["aggregated", "prefill"])
def test_metrics_have_vllms_names(start: Start, free_port: Callable[[], int], role: str) -> None:
    flags = () if role == "aggregated" else ("--role", role, "--side-channel-port", str(free_port()))
    engine = start(*flags)
    engine.complete("x", max_tokens=2)
    text = engine.get("/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    expected = {
        "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason",
        "kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "external_prefix_cache_queries_total", "external_prefix_cache_hits_total",
        "prompt_tokens_total", "prompt_tokens_by_source_total", "generation_tokens_total",
        "num_preemptions_total", "request_success_total", "time_to_first_token_seconds",
        "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "cache_config_info",
    }  # fmt: skip
    transfers = {
        "nixl_xfer_time_seconds", "nixl_post_time_seconds", "nixl_bytes_transferred",
        "nixl_num_descriptors", "nixl_num_failed_transfers_total", "nixl_num_failed_notifications_total",
        "nixl_num_kv_expired_reqs_total", "nixl_num_notifications_after_expiry_total",
    }  # fmt: skip
    assert {f"vllm:{name}" for name in expected} <= names
    assert ({f"vllm:{name}" for name in transfers} <= names) is (role == "prefill")
    assert 'vllm:generation_tokens_total{engine="0",model_name="toy"} 2.0' in text


def running(engine: FakeEngine) -> bool:
    return engine.metric("vllm:num_requests_running") == 1


def test_sigterm_finishes_running_streams_refuses_new_ones_and_exits_0(start: Start) -> None:
    engine = start("--shutdown-timeout", "60", "--itl-ms", "10")
    body = {"prompt": "x", "max_tokens": 200, "stream": True}
    with engine.post("/v1/completions", body, stream=True) as response:
        wait_until(lambda: running(engine), "the stream to run")
        engine.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Shutting down" in engine.output, "the drain to begin")
        assert engine.post("/v1/completions", {"prompt": "y"}).status_code == 503
        text = response.content.decode()
    assert text.count("data: ") == 201
    assert engine.process.wait(DEADLINE) == 0


def test_sigterm_without_a_timeout_aborts_and_exits_0(start: Start) -> None:
    engine = start()
    with engine.post("/v1/completions", LONG, stream=True) as response:
        wait_until(lambda: running(engine), "the stream to run")
        engine.process.send_signal(signal.SIGTERM)
        text = response.content.decode()
    assert '"finish_reason":"abort"' in text
    assert engine.process.wait(DEADLINE) == 0


def test_a_second_signal_exits_at_once(start: Start) -> None:
    engine = start("--shutdown-timeout", "600", "--itl-ms", "10000")
    with engine.post("/v1/completions", LONG, stream=True):
        wait_until(lambda: running(engine), "the stream to run")
        engine.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Received SIGTERM" in engine.output, "the first signal to arrive")
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(DEADLINE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-model-len", "1000", "--kv-blocks", "10"), "--max-model-len 1000 is larger"),
        (("--role", "prefill"), "--role prefill needs --side-channel-port"),
        (("--kv-events-config", "7"), "--kv-events-config 7: not a JSON object"),
        (("--port", "70000"), "a port is 0 to 65535"),
        (("--prefill-tokens-per-second", "0"), "must be more than 0"),
    ],
)
def test_wrong_flags_are_named(start: Start, flags: tuple[str, ...], words: str) -> None:
    engine = start(*flags)
    assert engine.process.wait(DEADLINE) == 2
    assert words in engine.output
