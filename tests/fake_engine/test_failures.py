"""Failures on command, and what is left afterwards."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import requests

from hpcserve.engines.fake import Fake
from hpcserve.engines.fake_server.failures import CRASH_STATUS, Failures

from .conftest import Start
from .running import DEADLINE, wait_until


def test_a_crash_takes_the_process(start: Start) -> None:
    engine = start()
    with pytest.raises(requests.ConnectionError):
        engine.post("/fake/fail", {"mode": "crash"})
    assert engine.process.wait(DEADLINE) == CRASH_STATUS


def test_a_crash_after_tokens_cuts_a_stream(start: Start) -> None:
    engine = start()
    engine.fail("crash_after", tokens=3)
    body = {"prompt": "x", "max_tokens": 10, "stream": True}
    received = b""
    with (
        pytest.raises(requests.RequestException),
        engine.post("/v1/completions", body, stream=True) as response,
    ):
        for piece in response.iter_content(None):
            received += piece
    assert received.count(b"data: ") == 3
    assert engine.process.wait(DEADLINE) == CRASH_STATUS


def test_a_crash_after_requests_serves_so_many(start: Start) -> None:
    engine = start("--fail", "crash_after:requests=2")
    engine.complete("a")
    engine.complete("b")
    with pytest.raises(requests.ConnectionError):
        engine.complete("c")
    assert engine.process.wait(DEADLINE) == CRASH_STATUS


def test_a_hanging_engine_accepts_and_says_nothing_until_reset(start: Start) -> None:
    engine = start()
    engine.fail("hang")
    for path in ("/health", "/metrics"):
        with pytest.raises(requests.ReadTimeout):
            requests.get(engine.url + path, timeout=0.2)
    engine.fail("reset")
    assert engine.get("/health").status_code == 200


def test_a_refusing_engine_answers_503_until_reset(start: Start) -> None:
    engine = start("--fail", "refuse")
    assert engine.get("/health").status_code == 503
    assert engine.post("/v1/completions", {"prompt": "x"}).status_code == 503
    engine.fail("reset")
    assert engine.get("/health").status_code == 200


def test_a_slow_engine_takes_so_many_times_longer(start: Start) -> None:
    engine = start("--itl-ms", "20", "--fail", "slow:factor=20")
    engine.complete("x", max_tokens=2)
    # 0.4 s, less what the simulated clock may have to catch up.
    assert engine.metric("vllm:inter_token_latency_seconds_sum") > 0.3


def test_a_holding_engine_stops_each_answer_where_it_was_told_until_release(start: Start) -> None:
    engine = start("--fail", "hold:tokens=5,spread=2")
    body = {"prompt": "x", "max_tokens": 9, "stream": True}
    streams = [engine.post("/v1/completions", body, stream=True) for _ in range(6)]
    wait_until(lambda: engine.metric("vllm:generation_tokens_total") == 2 * (5 + 6 + 7), "all to be held")
    assert engine.metric("vllm:num_requests_running") == 6
    engine.fail("release")
    assert all(stream.content.endswith(b"data: [DONE]\n\n") for stream in streams)
    assert engine.metric("vllm:generation_tokens_total") == 6 * 9


@pytest.mark.parametrize(
    ("cause", "diagnosed"),
    [
        ("port-taken", "port-taken"),
        ("oom", "out-of-memory"),
        ("model-missing", "model-missing"),
        ("disk-full", "disk-full"),
    ],
)
def test_a_failing_start_leaves_a_log_that_is_understood(start: Start, cause: str, diagnosed: str) -> None:
    engine = start("--fail", f"exit_at_start:cause={cause}")
    assert engine.process.wait(DEADLINE) == 1
    assert Fake().diagnose(engine.output, 1).cause == diagnosed


EVENTS = '{"enable_kv_cache_events":true,"endpoint":"tcp://127.0.0.1:PORT"}'


@pytest.mark.parametrize(("flag", "value"), [("--port", "PORT"), ("--kv-events-config", EVENTS)])
def test_a_port_that_is_taken_ends_the_start(start: Start, flag: str, value: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        engine = start(flag, value.replace("PORT", str(sock.getsockname()[1])))
        assert engine.process.wait(DEADLINE) == 1
    assert Fake().diagnose(engine.output, 1).cause == "port-taken"


def test_an_engine_that_never_gets_ready_stays_at_half_and_can_be_stopped(start: Start) -> None:
    engine = start("--fail", "never_ready")
    wait_until(lambda: " 50% Completed" in engine.output, "the loading to stop")
    assert "Application startup complete." not in engine.output
    engine.process.terminate()
    assert engine.process.wait(DEADLINE) == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ({}, "unknown mode"),
        ({"mode": "explode"}, "allowed: crash"),
        ({"mode": "hang", "count": 1}, "does not take count"),
        ({"mode": "slow", "factor": "fast"}, "factor must be"),
        ({"mode": "slow"}, "factor must be"),
        ({"mode": "crash_after"}, "needs requests or tokens"),
        ({"mode": "exit_at_start", "cause": "flood"}, "allowed: disk-full"),
    ],
)
def test_a_wrong_command_names_what_is_allowed(command: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Failures().apply(command)


def test_a_wrong_command_is_refused_over_http_and_on_the_command_line(start: Start) -> None:
    running, refused = start(), start("--fail", "explode")
    response = running.post("/fake/fail", {"mode": "explode"})
    assert response.status_code == 400
    assert "allowed" in response.json()["error"]["message"]
    assert refused.process.wait(DEADLINE) == 2
    assert "unknown mode 'explode'" in refused.output
