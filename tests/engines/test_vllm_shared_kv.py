"""Real vLLM on the CPU: KV blocks in a shared directory, from decode to prefill, and for the next job."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcserve.config.model import KvOffloadSpec
from hpcserve.config.site import StorageSite
from hpcserve.engines.kv_files import allow, make_directory
from hpcserve.engines.nixl_protocol import decode_request, prefill_request
from hpcserve.engines.vllm_tiers import TOKENS_PER_FILE as FILE
from tests.models import greedy, tiny_llama
from tests.patience import DEADLINE
from tests.plan.cases import model, site, tp

from .vllm_server import START, Server, greedy_request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

BLOCK, PROMPT, ANSWER, MORE, TOKENS = 32, 500, 270, 50, 8
"""Tokens: whole files end at 256, 512 and 768, the last two in the long answer, and behind the short ones."""


class Field:
    """A job's prefill and decode replicas, one after the other if asked for."""

    def __init__(self, path: Path, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._spec = model(
            model=str(path), served_name="tiny", device="cpu", dtype="float32", max_model_len=1024,
            prefill=tp(1), decode=tp(1),
            kv_offload=KvOffloadSpec(cpu_gib=0.125, disk_gib=0.125, shared_gib=0.25, answers=True),
            engine_args={
                "enforce-eager": True, "max-num-seqs": 4, "block-size": BLOCK, "num-gpu-blocks-override": 64,
            },
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"},
        )  # fmt: skip
        self._site = replace(
            site(gpus=0, engines=2, network="loopback"), storage=StorageSite(kv=str(directory))
        )

    def start(self, replica: str) -> tuple[Server, Path]:
        """With a node-local directory and a run directory of its own."""
        # Short: there are sockets below it.
        scratch = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hs-"))
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        allow(run_dir, 1, 64 << 20)
        cores = sorted(os.sched_getaffinity(0))
        core = cores[0] if replica == "prefill-0" else cores[-1]
        server = Server(
            self._spec, self._site, scratch, replica=replica, cpus=((core,),), run_dir=str(run_dir), nodes=1
        )
        self._stack.callback(server.close)
        return server, Path(scratch)


def prompts(path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "A cluster is many computers that share one queue. " * 60
    made = [tokenizer(f"{number}. {text}")["input_ids"][:PROMPT] for number in range(3)]
    assert {len(prompt) for prompt in made} == {PROMPT}
    return made


def files(directory: Path) -> set[Path]:
    return set(directory.glob("*/*/*.bin"))


def mapped(server: Server) -> set[str]:
    """Memory tiers that processes of the replica have, as the kernel names them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == server.process.pid:
                lines = (process / "maps").read_text().splitlines()
                found |= {line.split(maxsplit=5)[5] for line in lines if "/vllm_offload_" in line}
        except (ProcessLookupError, FileNotFoundError):
            continue  # gone meanwhile
    return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_an_answers_kv_is_found_by_prefill_and_all_of_it_by_the_next_job(
    tmp_path: Path, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    path, directory = tiny_llama(tmp_path / "tiny-llama"), tmp_path / "kv"
    make_directory(str(directory))
    first, second, third = prompts(path)
    # While engines run, there is no core left to compute on.
    expected = [greedy(path, prompt, TOKENS) for prompt in (first, second, third)]
    field = Field(path, directory, stack)
    (prefill, there), (decode, _) = field.start("prefill-0"), field.start("decode-0")
    for server in (prefill, decode):
        server.wait(server.healthy, START)
    # Nothing is left in /dev/shm of an engine that is killed.
    assert mapped(prefill)
    assert all(name.endswith("(deleted)") for name in mapped(prefill))

    turn = greedy_request(first, ANSWER)
    leg = prefill.ask(prefill_request(turn)).json()
    answer = decode.tokens(decode_request(turn, leg))
    assert answer[:TOKENS] == expected[0]
    decode.wait(lambda: len(files(directory)) == 3, DEADLINE)

    follows = [*first, *answer, *first[:MORE]]
    turn, before = greedy_request(follows, TOKENS), prefill.counted()
    leg = prefill.ask(prefill_request(turn)).json()
    grown = prefill.grown(before, 1)
    with capsys.disabled():
        print(f"\nprefill, second turn: {grown}")
    # The prompt's whole blocks are in prefill's own cache; what decode computed comes from a file.
    assert grown["in cache"] == PROMPT // BLOCK * BLOCK
    assert grown["in files"] == 3 * FILE - PROMPT // BLOCK * BLOCK
    assert grown["computed"] == len(follows) - 3 * FILE
    next_answer = decode.tokens(decode_request(turn, leg))

    by_prompt = []
    for prompt, tokens in ((second, expected[1]), (third, expected[2])):
        known = files(directory)
        assert prefill.tokens(greedy_request(prompt, TOKENS)) == tokens
        prefill.wait(lambda known=known: len(files(directory) - known) == 1, DEADLINE)
        by_prompt.append(files(directory) - known)
    assert any((there / "kv-blocks").rglob("*.bin"))
    assert {each.stat().st_mode & 0o777 for each in files(directory)} == {0o600}
    for server in (prefill, decode):
        server.kill()
    assert next_answer == greedy(path, follows, TOKENS)

    # As a crash of the file system's client leaves them: short, or with a hole.
    for each in by_prompt[0]:
        os.truncate(each, each.stat().st_size // 2)
    for each in by_prompt[1]:
        with each.open("r+b") as file:
            file.seek(8192)
            file.write(bytes(4096))
    damaged = {each: each.read_bytes() for found in by_prompt for each in found}

    again, _ = field.start("prefill-0")
    again.wait(again.healthy, START)
    for prompt, tokens, in_files in zip((first, second, third), expected, (FILE, 0, 0), strict=True):
        before = again.counted()
        assert again.tokens(greedy_request(prompt, TOKENS)) == tokens
        grown = again.grown(before, TOKENS)
        with capsys.disabled():
            print(f"the next job: {grown}")
        assert grown["computed"] == PROMPT - in_files
        if in_files:
            assert (grown["in files"], grown["in cache"]) == (in_files, 0)
    assert "not what was written" in again.log.read_text()
    # Computed again, they are whole again.
    again.wait(
        lambda: all(each.exists() and each.read_bytes() != was for each, was in damaged.items()), DEADLINE
    )
