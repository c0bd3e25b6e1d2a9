"""Real SGLang on the CPU: one prefill and two decode replicas out of `hpcserve launch`, KV over NIXL.

Not a part of `make test`: three engines take minutes to load on two cores (`make test-sglang`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fake_engine.running import wait_until
from tests.models import greedy, tiny_llama

from .launched_run import LaunchedRun

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1500)]

SGLANG = Path(os.environ.get("HPCSERVE_SGLANG", Path(__file__).resolve().parents[2] / ".sglang"))
MODEL = """\
model: {model}
served_name: tiny
engine: sglang
device: cpu
dtype: float32
max_model_len: 2048
ready_timeout: 1200
prefill: {{nodes: 1}}
decode: {{nodes: 2}}
env: {{PYTHONPATH: "{sglang}"}}
engine_args: {{max-total-tokens: 8192, sleep-on-idle: true}}
"""
PROMPTS = [f"{number} quick brown foxes jump over the lazy dog" for number in range(4)]
TOKENS = 120


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sglang") / "tiny")


@pytest.fixture(scope="module")
def expected(weights: Path) -> list[list[int]]:
    """What transformers says to the prompts, greedily: an opinion that is not SGLang's."""
    return [greedy(weights, prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, weights: Path, expected: list[list[int]]
) -> Iterator[LaunchedRun]:
    """Started once the answers are known: beside three engines they would take longer."""
    launched = LaunchedRun(
        tmp_path_factory.mktemp("run"), MODEL.format(model=weights, sglang=SGLANG), nodes=3
    )
    try:
        launched.start(seconds=1300)  # later than it gives up itself
        yield launched
    finally:
        launched.stop()


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    always = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return {**always, "prompt": prompt, **fields}


def ask(run: LaunchedRun, asked: dict[str, Any]) -> requests.Response:
    key = {"authorization": f"Bearer {run.key}"}
    return requests.post(f"{run.url}/completions", json=asked, headers=key, timeout=300, stream=True)


def stream(run: LaunchedRun, prompt: str, started: list[str] | None = None) -> tuple[str, list[int]]:
    """Text and token ids of a stream; `started` gets the prompt with the first event."""
    text, ids = "", []
    with ask(run, body(prompt, stream=True, return_token_ids=True)) as response:
        assert response.status_code == 200, response.text
        for line in response.iter_lines(chunk_size=1):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["text"]
                ids += choice["token_ids"] or []
            if started is not None and prompt not in started:
                started.append(prompt)
    return text, ids


@pytest.fixture(scope="module")
def engines(run: LaunchedRun) -> dict[str, str]:
    """Where each replica's API is, before one of them starts again."""
    status = json.loads(run.hpcserve("status", "--json", run.name).stdout)
    return {worker["name"]: worker["url"] for worker in status["controller"]["workers"]}


@pytest.fixture(scope="module")
def unbroken(run: LaunchedRun) -> list[tuple[str, list[int]]]:
    """Streams of all prompts at once, while all engines live."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: stream(run, prompt), PROMPTS))


def busy(run: LaunchedRun, urls: Iterable[str]) -> float:
    """Requests that the engines themselves say they have, on their way between the two as well."""
    key = {"authorization": f"Bearer {run.job_key}"}
    total = 0.0
    for url in urls:
        for line in requests.get(f"{url}/metrics", headers=key, timeout=60).text.splitlines():
            name = line.partition("{")[0]
            if name.startswith("sglang:num_") and name.endswith(("running_reqs", "queue_reqs")):
                total += float(line.rpartition(" ")[2])
    return total


def test_kv_passed_and_answers_are_those_of_another_program(
    run: LaunchedRun, unbroken: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    proven = run.events("kv-path")
    assert {event["decode"] for event in proven if event["ok"]} == {"decode-0", "decode-1"}
    assert all(event["bytes"] > 0 for event in proven if event["ok"])
    assert [ids for _, ids in unbroken] == expected
    whole = ask(run, body(PROMPTS[0])).json()
    assert whole["choices"][0]["text"] == unbroken[0][0]
    assert whole["usage"]["completion_tokens"] == TOKENS


def test_no_path_of_an_engine_is_open(engines: dict[str, str]) -> None:
    for url in engines.values():
        for path in ("/ready", "/health", "/metrics", "/v1/models", "/server_info"):
            assert requests.get(url + path, timeout=60).status_code == 401, path


def test_a_client_that_leaves_frees_both_legs(run: LaunchedRun, engines: dict[str, str]) -> None:
    with ask(run, body(PROMPTS[0], stream=True, max_tokens=1500)) as response:
        # Kept: a reader that is thrown away closes the connection.
        lines = response.iter_lines(chunk_size=1)
        next(lines)
        wait_until(lambda: busy(run, engines.values()) >= 1, "the engines to count it, every 40 steps")
    wait_until(lambda: busy(run, engines.values()) == 0, "both legs to end")


def test_streams_of_a_killed_decode_replica_go_on_at_the_other(
    run: LaunchedRun, engines: dict[str, str], unbroken: list[tuple[str, list[int]]]
) -> None:
    started: list[str] = []
    victim = _process(engines["decode-1"])
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams = [pool.submit(stream, run, prompt, started) for prompt in PROMPTS]
        wait_until(lambda: len(started) == len(PROMPTS), "all streams to begin")
        os.killpg(victim, signal.SIGKILL)
        ends = [each.result(timeout=600) for each in streams]
    assert ends == unbroken
    key = {"authorization": f"Bearer {run.key}"}
    metrics = requests.get(run.url.removesuffix("/v1") + "/metrics", headers=key, timeout=60).text
    moved = [line for line in metrics.splitlines() if 'migrations_total{result="resumed"' in line]
    assert sum(float(line.rpartition(" ")[2]) for line in moved) > 0
    survivors = [engines["prefill-0"], engines["decode-0"]]
    wait_until(lambda: busy(run, survivors) == 0, "all requests to end")


def _process(url: str) -> int:
    """The first process of the replica with this API, whose id is that of its group."""
    port = url.rpartition(":")[2].encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"hpcserve.engines.sglang_server" in words and port in words:
                return int(entry.name)
    raise AssertionError(f"no process of {url}")
