"""Real vLLM on the CPU: the header chooses the rank, and what its cache has no room for is kept in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcserve.config.model import KvOffloadSpec
from tests.models import greedy, tiny_llama
from tests.plan.cases import model, site, tp

from .vllm_server import START, Server, greedy_request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

BLOCKS, BLOCK = 20, 32
"""Of each rank's KV cache: room for four prompts."""
PROMPTS = [
    f"{number}. A cluster is many computers that share one queue. " * 8 + "One node asks another"
    for number in range(6)
]
TOKENS = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Server]:
    # Short: there are sockets below it.
    with tempfile.TemporaryDirectory(prefix="hs-") as scratch:
        spec = model(
            model=str(path), served_name="tiny", device="cpu", dtype="float32", max_model_len=512,
            aggregated=tp(1, data_parallel=2), kv_offload=KvOffloadSpec(cpu_gib=0.125),
            engine_args={
                "enforce-eager": True, "max-num-seqs": 4, "block-size": BLOCK,
                "num-gpu-blocks-override": BLOCKS,
            },
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
        )  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))
        at = site(gpus=0, engines=2, network="loopback")
        running = Server(spec, at, scratch, cpus=((cores[0],), (cores[-1],)))
        try:
            running.wait(running.healthy, START)
            yield running
        finally:
            running.close()


def test_the_rank_that_is_named_computes_and_finds_in_memory_what_it_evicted(
    server: Server, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [greedy(path, prompt, TOKENS) for prompt in PROMPTS]
    asked = [greedy_request(prompt, TOKENS) for prompt in PROMPTS]
    before, other = server.counted(1), server.counted(0)
    assert [server.tokens(body, 1) for body in asked] == expected
    first = server.grown(before, len(PROMPTS) * TOKENS, 1)
    assert first["in cache"] == first["in memory"] == 0
    assert server.counted(0) == other

    before = server.counted(1)
    assert server.tokens(asked[0], 1) == expected[0]
    again = server.grown(before, TOKENS, 1)
    with capsys.disabled():
        print(f"\n{len(PROMPTS)} prompts: {first}; the first again: {again}")
    prompt = first["computed"] / len(PROMPTS)
    # All whole blocks, and none of them from the cache itself.
    assert again["in cache"] == 0
    assert again["in memory"] == prompt // BLOCK * BLOCK > 0
    assert again["computed"] == prompt % BLOCK

    assert server.tokens(asked[1], 0) == expected[1]
    assert server.grown(other, TOKENS)["computed"] == prompt
    assert server.ask(asked[0], 2).status_code == 400
