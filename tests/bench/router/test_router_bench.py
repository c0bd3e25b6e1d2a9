"""`hpcserve bench router`: the mock engine, the load generator, what is counted, and what is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from hpcserve.bench.router import cost, report
from hpcserve.bench.router.compare import compare
from hpcserve.bench.router.measure import Generator, Load, engines
from hpcserve.bench.router.peers import find
from hpcserve.errors import UsageError
from tests.patience import DEADLINE


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with engines(1, 0.001) as ports:
        yield ports[0]


def _ask(port: int, **body: Any) -> requests.Response:
    body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | body
    return requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=DEADLINE)


def _events(answer: requests.Response) -> list[Any]:
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_mock_engine_streams_ids_and_usage_only_to_those_who_ask(port: int) -> None:
    plain = _events(_ask(port, stream=True))
    assert len(plain) == 4 and plain[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("token_ids" in event["choices"][0] or "prompt_token_ids" in event for event in plain)
    more = _events(_ask(port, stream=True, return_token_ids=True, stream_options={"include_usage": True}))
    assert more[0]["prompt_token_ids"] and more[1]["choices"][0]["token_ids"]
    assert more[-1]["choices"] == [] and more[-1]["usage"]["completion_tokens"] == 3


def test_mock_engine_speaks_the_two_legs(port: int) -> None:
    prefilled = _ask(port, kv_transfer_params={"do_remote_decode": True}).json()
    params = prefilled["kv_transfer_params"]
    assert params["do_remote_prefill"] and params["remote_block_ids"]
    assert _ask(port, kv_transfer_params=params).json()["choices"][0]["finish_reason"] == "length"


def test_mock_engine_streams_to_pairs_as_sglang_does(port: int) -> None:
    first, second, *_ = _events(_ask(port, stream=True, bootstrap_room=1))
    assert first["choices"][0]["delta"] == {"reasoning_content": None, "role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"reasoning_content": None, "content": " hello"}
    assert "matched_stop" in second["choices"][0]


def test_load_generator_counts_answers_and_errors(port: int) -> None:
    generator = Generator()
    try:
        load = Load(name="short", connections=3, requests=20, words=10, tokens=2)
        found = generator.run([port], load)
        assert (found["answers"], found["errors"], len(found["ttft"])) == (20, 0, 20)
        assert found["events"] == 20 * 3
        # Nobody answers there: every request is an error.
        broken = Load(name="short", connections=1, requests=5, words=10, tokens=-1)
        assert generator.run([port], broken)["errors"] > 0
    finally:
        generator.close()


def test_cpu_time_of_a_whole_tree_is_counted() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + DEADLINE
        while cost.cpu_seconds(process.pid) < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(cost.tree(process.pid)) == 2
        sizes = cost.resident(process.pid)
        assert len(sizes) == 2 and sizes[0] >= sizes[1] > 0
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_peer_that_is_not_installed_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find("vllm-router", tmp_path) is None
    found = compare(
        directory=tmp_path,
        only=["vllm-router round_robin"],
        rounds=1,
        log=tmp_path / "log",
        say=lambda _: None,
    )
    assert "vllm-router round_robin  not installed" in report.table(found["routers"])


def test_an_unknown_peer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonsense"):
        compare(directory=None, only=["nonsense"], rounds=1, log=tmp_path / "log", say=lambda _: None)


def test_table_and_drawing_have_ratios_and_failures() -> None:
    ours = {"chunk": 8e-6, "short": 40e-6, "long": 1e-4, "ttft_1_p50": 2e-4, "rss": 4e7, "errors": 0}
    theirs = {key: value * 2 for key, value in ours.items()}
    results = {"hpcserve": ours, "nginx": theirs, "smg": {"failed": "it did not come up"}, "haproxy": None}
    text = report.table(results)
    assert "hpcserve / nginx" in text and "0.50" in text
    assert "failed: it did not come up" in text and "haproxy" in text
    drawing = report.svg(results)
    assert drawing.startswith("<svg") and drawing.count("<rect") == 1 + 2 * 5
