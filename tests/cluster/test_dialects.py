"""Launched runs that are served in SGLang's and in TensorRT-LLM's protocol: 2 prefill and 2 decode fake
engines on four nodes, by real sbatch as an ordinary user, and what breaks them.

One run for each, in which one thing after the other happens: a launch costs more than all of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fake_engine.running import FakeEngine

from .launched import Launched, Launches, bearer
from .test_fake_disaggregated import (
    PROMPT,
    Streamed,
    complete,
    in_flight,
    in_rotation,
    read_stream,
    worker_out,
)
from .testbed import Testbed, wait_for

MODEL = """\
model: example/nothing-to-load
served_name: fake
engine: fake
walltime: 00:20:00
prefill: {{replicas: 2, nodes: 2}}
decode: {{replicas: 2, nodes: 2}}
max_model_len: 4096
engine_args: {{dialect: {dialect}, itl-ms: 20}}
"""
ENGINES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
STREAMS = 12
TOKENS = 500  # 10 s: they all run when their engine is killed, on a slow machine as well


@pytest.fixture(params=["sglang", "tensorrt-llm"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(launches: Launches, dialect: str) -> Iterator[Launched]:
    launched = launches.launch(MODEL.format(dialect=dialect), name=f"fake-{dialect}")
    launched.wait_ready()
    yield launched
    launched.cancel()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[FakeEngine]:
    """One engine of the same model that does it all."""
    engine = FakeEngine(tmp_path / "alone", "--served-model-name", "fake", "--itl-ms", "0.1")
    yield engine
    engine.stop()


@pytest.mark.timeout(480)
def test_a_run_in_this_dialect_serves_and_survives_its_engines(
    cluster: Testbed, run: Launched, dialect: str, alone: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    proven = run.events("kv-path")
    assert {event["decode"] for event in proven} == {"decode-0", "decode-1"}
    # Nobody counts bytes in TensorRT-LLM's protocol; that decode answered shows that they came.
    assert all(event["ok"] and (dialect == "tensorrt-llm" or event["bytes"] > 0) for event in proven)

    expected = [_expected(alone, number, TOKENS) for number in range(STREAMS)]
    assert complete(run, f"0 {PROMPT}", 40)[1]["choices"][0]["text"] == _expected(alone, 0, 40)
    streamed = read_stream(run, 1, 40)
    assert (streamed.text, streamed.error) == (_expected(alone, 1, 40), None)

    _leave_in_the_middle(run)
    wait_for(lambda: unfinished(run, dialect) == 0, what="both legs to end", state=run.logs)

    with capsys.disabled():
        print()
        for victim in ("decode-1", "prefill-1"):
            ends = _during(run, lambda victim=victim: kill(cluster, run, victim))
            told = [end for end in ends if end.error is not None]
            print(f"{dialect}: {victim} killed, {len(told)} of {STREAMS} streams ended with an error")
            for end, text in zip(ends, expected, strict=True):
                if end.error is None:
                    assert end.text == text
                else:
                    # Text that was sent is right, whatever came of the rest.
                    assert "decode-1" in end.error and text.startswith(end.text)
            # TensorRT-LLM's streams can't go on elsewhere, and those of a prefill engine need it no more.
            assert bool(told) == (victim == "decode-1" and dialect == "tensorrt-llm")
            wait_for(lambda victim=victim: worker_out(run, victim), what=f"{victim} to leave", state=run.logs)
            wait_for(lambda: in_rotation(run) == set(ENGINES), what="all to be back", state=run.logs)
            for number in range(8):
                status, answer = complete(run, f"again {number}")
                assert status == 200, answer
    died = {event["replica"] for event in run.events("engine-died")}
    assert died == {"decode-1", "prefill-1"}
    wait_for(lambda: unfinished(run, dialect) == 0, what="all requests to end", state=run.logs)

    run.stop()
    run.wait_gone()
    for host in cluster.hosts:
        assert cluster.commands_of("hsuser", host.name) == []
    assert run.events("stopped")


def _expected(alone: FakeEngine, number: int, tokens: int) -> str:
    body = {"prompt": f"{number} {PROMPT}", "max_tokens": tokens, "ignore_eos": True}
    text: str = alone.post("/v1/completions", body).json()["choices"][0]["text"]
    return text


def _leave_in_the_middle(run: Launched) -> None:
    body = {
        "model": "fake",
        "prompt": f"left {PROMPT}",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    with requests.post(
        f"{run.url}/completions", json=body, headers=bearer(run.api_key), stream=True, timeout=60
    ) as response:
        assert response.status_code == 200, response.text
        # Kept: a reader that is thrown away closes the connection.
        lines = response.iter_lines()
        next(lines)
        wait_for(lambda: in_flight(run) == 1, what="the stream to run", state=run.logs)


def _during(run: Launched, happens: Any) -> list[Streamed]:
    with ThreadPoolExecutor(STREAMS) as pool:
        streams: list[Future[Streamed]] = [pool.submit(read_stream, run, n, TOKENS) for n in range(STREAMS)]
        wait_for(lambda: in_flight(run) == STREAMS, what="the streams to run", state=run.logs)
        happens()
        return [stream.result(timeout=90) for stream in streams]


def kill(cluster: Testbed, run: Launched, replica: str) -> None:
    """SIGKILL to an engine's process, and to no other."""
    processes = cluster.processes_of("hsuser", run.node_of(replica))
    found = [pid for pid, command in processes.items() if "hpcserve.engines.fake_server" in command]
    assert len(found) == 1, processes
    os.kill(found[0], signal.SIGKILL)


def unfinished(run: Launched, dialect: str) -> float:
    """Requests that the engines themselves say they have, and prompts that they keep for others."""
    total = 0.0
    for worker in run.workers().values():
        key = bearer(run.job_key)
        if dialect == "tensorrt-llm":
            load = requests.get(f"{worker['url']}/fake/load", headers=key, timeout=20).json()
            total += load["unfinished"] + load["held"]
            continue
        for line in requests.get(f"{worker['url']}/metrics", headers=key, timeout=20).text.splitlines():
            if line.startswith(("sglang:num_running_reqs{", "sglang:num_queue_reqs{")):
                total += float(line.rpartition(" ")[2])
    return total
