"""Real vLLM on the CPU, 1 prefill + 1 decode on two nodes, launched like any run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests.models import smollm2

from . import paths
from .launched import Launched, Launches, bearer
from .testbed import Testbed, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

MODEL = """\
model: {model}
served_name: smollm2
engine: vllm
device: cpu
dtype: float32
max_model_len: 2048
walltime: 00:30:00
prefill: {{nodes: 1}}
decode: {{nodes: 1}}
engine_args: {{enforce-eager: true, max-num-seqs: 4}}
"""
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about computers.",
    "What is 2 + 2?",
    "Explain a queue to a child.",
    "Who wrote Hamlet?",
    "List five animals.",
    "What is water made of?",
    "Tell me a very short story about a fox.",
    "How many days are in a year?",
    "What is the speed of light?",
    "Say hello in Spanish.",
    "Why is the sky blue?",
    "What does a compiler do?",
    "Name the planets.",
    "What is a prime number?",
    "Give a recipe for tea.",
    "What is the largest ocean?",
    "Define entropy.",
    "How do birds fly?",
)
_START = 240
"""Seconds an engine may take on a busy machine of two cores."""


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2(paths.MODELS / "SmolLM2-135M-Instruct")


def test_answers_through_nixl_equal_one_engine_and_decode_keeps_its_speed(
    cluster: Testbed, launches: Launches, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with by_hand(cluster, "n1", alone(cluster, model)) as url:
        expected = [answer(url, question) for question in QUESTIONS]

    run = launches.launch(MODEL.format(model=model), name="smollm2", nodes=2)
    try:
        run.wait_ready(seconds=2 * _START)
        command = engine_command(cluster, run, "decode")
        before = nixl_bytes(run)
        answers = [answer(run.url, question, run.api_key) for question in QUESTIONS]
        moved = nixl_bytes(run) - before
        in_job = decode_speed(decode_url(run), run.job_key)
    finally:
        run.cancel()

    with by_hand(cluster, "n2", command) as url:
        hand = decode_speed(url, run.job_key)

    with capsys.disabled():
        print(f"\nNIXL moved {moved:,.0f} bytes for {len(QUESTIONS)} prompts; {answers[0]!r}")
        print(f"decode: {in_job:.0f} tokens/s in the job, {hand:.0f} by hand: {in_job / hand:.2f} x")
    assert answers == expected
    assert "Paris" in answers[0]
    assert moved > 0
    assert in_job >= 0.7 * hand


def alone(cluster: Testbed, model: Path) -> tuple[list[str], dict[str, str]]:
    """One engine without disaggregation, as its documentation starts it."""
    argv = [str(paths.PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "2048"]
    argv += ["--enforce-eager", "--max-num-seqs", "4", "--host", cluster.host("n1").address, "--port", "8000"]
    env = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return argv, {**env, "VLLM_NO_USAGE_STATS": "1"}


def engine_command(cluster: Testbed, run: Launched, role: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of the job's own engine, less what Slurm put there."""
    node = run.node_of(f"{role}-0")
    for pid in cluster.processes(node):
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        if any("openai.api_server" in word for word in argv):
            pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            return argv, {name: value for name, value in env.items() if not name.startswith("SLURM")}
    raise AssertionError(f"no {role} engine on {node}: {run.logs()}")


@contextmanager
def by_hand(cluster: Testbed, node: str, command: tuple[list[str], Mapping[str, str]]) -> Iterator[str]:
    """The engine started in a shell on a node, outside Slurm; its URL once it answers."""
    argv, env = command
    url = f"http://{argv[argv.index('--host') + 1]}:{argv[argv.index('--port') + 1]}"
    log = paths.LOGS / f"by-hand-{node}.log"
    key = env.get("VLLM_API_KEY", "")
    with log.open("w") as output:
        engine = cluster.start_as_user("hsuser", argv, env, node=node, output=output)
    try:
        wait_for(
            lambda: engine.poll() is not None or healthy(url, key),
            seconds=_START,
            what=f"the engine on {node} to answer",
            state=lambda: log.read_text()[-3000:],
            pause=0.5,
        )
        assert engine.poll() is None, log.read_text()[-3000:]
        yield url
    finally:
        end_session(engine)


def end_session(engine: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        engine.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait(30)


def healthy(url: str, key: str) -> bool:
    try:
        return requests.get(f"{url}/health", headers=bearer(key), timeout=5).status_code == 200
    except requests.RequestException:
        return False


def answer(url: str, question: str, key: str = "") -> str:
    base = url if url.endswith("/v1") else f"{url}/v1"
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
    }
    response = requests.post(f"{base}/chat/completions", json=body, headers=bearer(key), timeout=300)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def decode_speed(url: str, key: str) -> float:
    """Tokens per second of one greedy answer of 48 tokens: the best of three."""
    best = 0.0
    for number in range(3):
        body = {"model": "smollm2", "prompt": f"{number}. Once", "max_tokens": 48, "temperature": 0}
        begun = time.perf_counter()
        response = requests.post(
            f"{url}/v1/completions", json={**body, "ignore_eos": True}, headers=bearer(key), timeout=300
        )
        assert response.status_code == 200, response.text
        best = max(best, 48 / (time.perf_counter() - begun))
    return best


def decode_url(run: Launched) -> str:
    url: str = run.workers()["decode-0"]["url"]
    return url


def nixl_bytes(run: Launched) -> float:
    """KV bytes the decode engine has pulled, from its own metrics."""
    text = requests.get(f"{decode_url(run)}/metrics", headers=bearer(run.job_key), timeout=30).text
    values = re.findall(r"^vllm:nixl_bytes_transferred_sum\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))
