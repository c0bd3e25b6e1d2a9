"""Real vLLM on the CPU: the header chooses the rank, and what its cache has no room for is kept in memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests

from hpcserve.config.model import KvOffloadSpec
from tests.models import greedy, tiny_llama
from tests.patience import DEADLINE
from tests.plan.cases import model, site, tp
from tests.router.migration.field import free_port

from .cases import command

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

KEY = "job-key"
BLOCKS, BLOCK = 20, 32
"""Of each rank's KV cache: room for four prompts."""
PROMPTS = [
    f"{number}. A cluster is many computers that share one queue. " * 8 + "One node asks another"
    for number in range(6)
]
TOKENS = 16
_START = 600
"""Seconds a server with two engines may take on a busy machine of two cores."""


class Server:
    """One API and two ranks, started as the agent would start them."""

    def __init__(self, path: Path, scratch: str) -> None:
        spec = model(
            model=str(path), served_name="tiny", device="cpu", dtype="float32", max_model_len=512,
            aggregated=tp(1, data_parallel=2), kv_offload=KvOffloadSpec(cpu_gib=0.125),
            engine_args={
                "enforce-eager": True, "max-num-seqs": 4, "block-size": BLOCK,
                "num-gpu-blocks-override": BLOCKS,
            },
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
        )  # fmt: skip
        port = free_port()
        cores = sorted(os.sched_getaffinity(0))
        made = command(
            spec,
            site(gpus=0, engines=2, network="loopback"),
            replica="aggregated-0",
            address="127.0.0.1",
            head_address="127.0.0.1",
            ports={"http": str(port)},
            python=sys.executable,
            scratch=scratch,
            cpus=((cores[0],), (cores[-1],)),
        )
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(scratch) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                made.argv,
                env={**os.environ, **made.env, "VLLM_API_KEY": KEY},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except requests.RequestException:
            return False

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=_headers(), timeout=60)

    def ask(self, prompt: str, rank: int) -> Any:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return requests.post(
            f"{self.url}/v1/completions",
            json=body,
            headers=_headers({"x-data-parallel-rank": str(rank)}),
            timeout=300,
        )

    def tokens(self, prompt: str, rank: int) -> list[int]:
        answer = self.ask(prompt, rank)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    def counted(self, rank: int) -> dict[str, float]:
        """Tokens, as the rank's own counters have them."""
        page, by = self.get("/metrics").text, f'engine="{rank}"'
        return {
            "generated": _sum(page, "vllm:generation_tokens_total", by),
            "in cache": _sum(page, "vllm:prefix_cache_hits_total", by),
            "in memory": _sum(page, "vllm:prompt_tokens_cached_by_source_total", by, 'source="host"'),
            "computed": _sum(page, "vllm:prompt_tokens_by_source_total", by, 'source="local_compute"'),
        }

    def grown(self, rank: int, before: Mapping[str, float], answers: int) -> dict[str, float]:
        """What is new since `before`, once it has so many more answers."""
        wanted = before["generated"] + answers * TOKENS
        self.wait(lambda: self.counted(rank)["generated"] == wanted, DEADLINE)
        return {name: value - before[name] for name, value in self.counted(rank).items()}

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def _headers(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", **(more or {})}


def _sum(page: str, name: str, *labels: str) -> float:
    samples = re.findall(rf"^{re.escape(name)}\{{([^}}]*)\}} (\S+)$", page, re.MULTILINE)
    return sum(float(value) for found, value in samples if all(label in found for label in labels))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Server]:
    # Short: there are sockets below it.
    with tempfile.TemporaryDirectory(prefix="hs-") as scratch:
        running = Server(path, scratch)
        try:
            running.wait(running.healthy, _START)
            yield running
        finally:
            running.close()


def test_the_rank_that_is_named_computes_and_finds_in_memory_what_it_evicted(
    server: Server, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [greedy(path, prompt, TOKENS) for prompt in PROMPTS]
    before, other = server.counted(1), server.counted(0)
    assert [server.tokens(prompt, 1) for prompt in PROMPTS] == expected
    first = server.grown(1, before, len(PROMPTS))
    assert first["in cache"] == first["in memory"] == 0
    assert server.counted(0) == other

    before = server.counted(1)
    assert server.tokens(PROMPTS[0], 1) == expected[0]
    again = server.grown(1, before, 1)
    with capsys.disabled():
        print(f"\n{len(PROMPTS)} prompts: {first}; the first again: {again}")
    prompt = first["computed"] / len(PROMPTS)
    # All whole blocks, and none of them from the cache itself.
    assert again["in cache"] == 0
    assert again["in memory"] == prompt // BLOCK * BLOCK > 0
    assert again["computed"] == prompt % BLOCK

    assert server.tokens(PROMPTS[1], 0) == expected[1]
    assert server.grown(0, other, 1)["computed"] == prompt
    assert server.ask("x", 2).status_code == 400
