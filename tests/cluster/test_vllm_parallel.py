"""Real vLLM on the CPU with what one replica of one worker does not have, on four nodes.

Prefill is one replica of tensor_parallel 2 over two nodes. Decode is one of data_parallel 2 over the two
others, with tensor_parallel 1, and the router chooses between its ranks. What prefill has no room for is kept
in the nodes' memory.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.models import greedy, tiny_llama
from tests.patience import DEADLINE

from . import paths
from .launched import Launched, Launches, bearer
from .testbed import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

MODEL = """\
model: {model}
served_name: tiny
engine: vllm
device: cpu
dtype: float32
max_model_len: 512
walltime: 00:30:00
ready_timeout: 00:20:00
prefill: {{nodes: 2, tensor_parallel: 2, engine_args: {{num-gpu-blocks-override: {blocks}}}}}
decode: {{nodes: 2, data_parallel: 2, engine_args: {{num-gpu-blocks-override: 64}}}}
kv_offload: {{cpu_gib: 0.125}}
kv_lease: 300
kv_preflight: false
router: {{policy: round_robin}}
engine_args: {{enforce-eager: true, max-num-seqs: 4, block-size: {block}}}
env:
  VLLM_CPU_KVCACHE_SPACE: "1"
  TORCH_COMPILE_DISABLE: "1"
  VLLM_CPU_OMP_THREADS_BIND: nobind
  VLLM_CACHE_ROOT: {cache}
"""
# Each of the four nodes takes all cores for its own: engines that were bound to the same ones would starve
# each other, and a slow machine would let the prompts' leases end.
CACHE = paths.SHARED / "home/hsuser/.cache/vllm"
"""Of all engines: what one of them has found out about the model's class, the others need no process for."""
BLOCKS, BLOCK = 20, 32
"""Of prefill's KV cache: room for three prompts."""
BLOCK_BYTES = BLOCK * 4 * 2 * 4 * 32 * 4
"""Tokens x layers x keys and values x heads x values of a head x bytes of a value: tests/models.py."""
PROMPTS = [
    f"{number}. A cluster is many computers that share one queue. " * 8 + "One node asks another"
    for number in range(6)
]
TOKENS = 16
RANKS = ["decode-0#0", "decode-0#1"]
_START = 840
"""Seconds four engine processes may take on a busy machine of two cores."""


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_llama(paths.MODELS / "tiny-llama")


def test_prefill_over_two_nodes_and_decode_ranks_that_the_router_chooses(
    launches: Launches, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [greedy(model, prompt, TOKENS) for prompt in PROMPTS]
    begun = time.monotonic()
    spec = MODEL.format(model=model, blocks=BLOCKS, block=BLOCK, cache=CACHE)
    run = launches.launch(spec, name="parallel")
    try:
        run.wait_ready(seconds=_START)
        ready = time.monotonic() - begun
        paths_proven = {(event["prefill"], event["decode"]) for event in run.events("kv-path") if event["ok"]}
        urls = {name: worker["url"] for name, worker in run.workers().items()}
        before = Tokens.of(run, urls)
        answers = [answer(run, prompt) for prompt in PROMPTS]
        chosen = placed(run)[-len(PROMPTS) :]  # before them came the one that READY waits for
        wait_for(
            lambda: (Tokens.of(run, urls) - before).generated == Counter(chosen),
            seconds=DEADLINE,
            what="each rank to count the answers that it was chosen for",
            state=lambda: f"{chosen} {Tokens.of(run, urls)} {before}\n{run.logs()}",
        )
        wait_for(
            lambda: kv_sources(run) == len(RANKS) + 1,
            seconds=DEADLINE,
            what="the KV events of prefill and of each rank to be followed",
            state=run.logs,
        )
        moved = Tokens.of(run, urls) - before
        before_again = Prefixes.of(run, urls)
        repeated = answer(run, PROMPTS[0])
        wait_for(
            lambda: (Prefixes.of(run, urls) - before_again).answers == 1,
            seconds=DEADLINE,
            what="prefill to count the prompt that it was asked again",
            state=run.logs,
        )
        again = Prefixes.of(run, urls) - before_again
        logs = [
            (run.run_dir / "logs" / f"prefill-0.{run.node_of('prefill-0', place)}.log").read_text()
            for place in range(2)
        ]
    finally:
        run.cancel()
    with capsys.disabled():
        print(f"\nREADY after {ready:.0f} s; {len(PROMPTS)} prompts to {Counter(chosen)}; {moved}")
        print(f"the first prompt again, after {len(PROMPTS) - 1} others: {again}")
    assert answers == expected
    assert repeated == expected[0]
    assert set(chosen) == set(RANKS)
    # Nothing of it was left in prefill's cache, and nearly all of it was kept.
    assert again.in_cache == 0
    assert again.kept >= again.asked - 2 * BLOCK > 0
    assert paths_proven == {("prefill-0", rank) for rank in RANKS}
    # All whole blocks of all prompts: half of each from either node.
    whole = again.asked // BLOCK * BLOCK_BYTES
    assert all(moved.kv_bytes[rank] >= moved.generated[rank] * whole for rank in RANKS)
    assert ["Worker_TP0" in log for log in logs] == [True, False]
    assert ["Worker_TP1" in log for log in logs] == [False, True]


class Tokens:
    """What the engines' own counters say, by rank."""

    def __init__(self, generated: Counter[str], kv_bytes: Counter[str]) -> None:
        self.generated = generated
        """Answers."""
        self.kv_bytes = kv_bytes

    @classmethod
    def of(cls, run: Launched, urls: Mapping[str, str]) -> Tokens:
        generated: Counter[str] = Counter()
        kv_bytes: Counter[str] = Counter()
        for number, name in enumerate(RANKS):
            text, rank = metrics(run, urls[name]), f'engine="{number}"'
            generated[name] = round(summed(text, "vllm:generation_tokens_total", rank) / TOKENS)
            kv_bytes[name] = round(summed(text, "vllm:nixl_bytes_transferred_sum", rank))
        return cls(generated, kv_bytes)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.generated - other.generated, self.kv_bytes - other.kv_bytes)

    def __repr__(self) -> str:
        return f"answers {dict(self.generated)}, NIXL bytes {dict(self.kv_bytes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """Tokens of prompts, as prefill's own counters have them."""

    answers: int
    asked: int
    in_cache: int
    kept: int
    """Found in the node's memory."""

    @classmethod
    def of(cls, run: Launched, urls: Mapping[str, str]) -> Prefixes:
        text = metrics(run, urls["prefill-0"])
        return cls(
            answers=round(summed(text, "vllm:generation_tokens_total")),
            asked=round(summed(text, "vllm:prefix_cache_queries_total")),
            in_cache=round(summed(text, "vllm:prefix_cache_hits_total")),
            kept=round(summed(text, "vllm:prompt_tokens_cached_by_source_total", 'source="host"')),
        )

    def __sub__(self, other: Prefixes) -> Prefixes:
        return Prefixes(
            answers=self.answers - other.answers,
            asked=self.asked - other.asked,
            in_cache=self.in_cache - other.in_cache,
            kept=self.kept - other.kept,
        )


def answer(run: Launched, prompt: str) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, reply = run.request("/completions", body, timeout=300)
    assert status == 200, reply
    ids: list[int] = reply["choices"][0]["token_ids"]
    return ids


def placed(run: Launched) -> list[str]:
    """The ranks that the router chose for all requests so far, in their order."""
    status, reply = run.request("/hpcserve/decisions?limit=50")
    assert status == 200, reply
    return [request["decisions"][-1]["worker"] for request in reversed(reply["data"])]


def kv_sources(run: Launched) -> int:
    """Workers whose KV events the router follows."""
    text = requests.get(
        f"{run.url.removesuffix('/v1')}/metrics", headers=bearer(run.api_key), timeout=30
    ).text
    return round(summed(text, "hpcserve_router_kv_index_entries", 'what="live_sources"'))


def metrics(run: Launched, url: str) -> str:
    """What an engine's server says of itself."""
    return requests.get(f"{url}/metrics", headers=bearer(run.job_key), timeout=60).text


def summed(text: str, name: str, label: str = "") -> float:
    """A metric, added up over all its samples that have a label."""
    values = re.findall(rf"^{re.escape(name)}\{{[^}}]*{label}[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))
