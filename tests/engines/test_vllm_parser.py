"""The real vLLM accepts what the adapter makes. One subprocess: vLLM takes long to import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest

from hpcserve.config.model import KvOffloadSpec, RoleSpec
from hpcserve.config.site import StorageSite
from hpcserve.engines.vllm import VLLM
from hpcserve.render.engine import engine_commands
from tests.plan.cases import model, site, tp
from tests.render.golden import RECIPES, recipe

from .cases import command, context

TIERS = KvOffloadSpec(cpu_gib=100, disk_gib=1000)
READ = """
import json, sys
from vllm.config import KVTransferConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve.middleware import register
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

read = []
for argv in json.load(sys.stdin):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    transfer = args.kv_transfer_config
    assert transfer is None or isinstance(transfer, KVTransferConfig), transfer
    read.append({
        "host": args.host, "port": args.port, "model": args.model, "tag": args.model_tag,
        "headless": args.headless, "nnodes": args.nnodes, "middleware": args.middleware,
        "served": args.served_model_name, "shutdown": args.shutdown_timeout,
        "role": transfer and transfer.kv_role, "seqs": args.max_num_seqs,
        "parallel": [args.tensor_parallel_size, args.data_parallel_size, args.enable_expert_parallel],
        "connector": transfer and transfer.kv_connector, "hybrid": args.data_parallel_hybrid_lb,
        "prefix": args.enable_prefix_caching, "overrides": args.hf_overrides,
        "cumem": args.enable_cumem_allocator,
    })
    if transfer is not None and transfer.engine_id.startswith("test-"):
        region = SharedOffloadRegion(transfer.engine_id, 1, None, 4096, 4096)
        read[-1]["memory"] = region.mmap_path
        region.cleanup()
print("READ" + json.dumps(read))
"""


def _filled_in(argv: Sequence[str]) -> list[str]:
    """The words of a dry run, with what a job puts in the place of its variables."""
    words = [word for word in argv if word != "serve"]
    return [re.sub(r"\$[A-Z_]+_PORT", "20001", word).replace("$ADDRESS", "10.0.0.1") for word in words]


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_reads_every_command_line() -> None:
    options = {
        "max-num-seqs": 64, "enforce_eager": True, "enable_prefix_caching": False, "hf-overrides": {"a": 1},
    }  # fmt: skip
    pair = model(
        prefill=RoleSpec(), decode=RoleSpec(), dtype="float32", max_model_len=2048, engine_args=options
    )
    wide = model(prefill=tp(4, data_parallel=4, expert_parallel=True), decode=tp(8))
    start = f"test-{os.getpid()}"
    alone_tiered = context(model(kv_offload=TIERS), site(), replica="aggregated-0", start=start)
    made = [
        command(pair, site(gpus=0), replica="prefill-0", nodes=2),
        command(pair, site(gpus=0), replica="decode-0", nodes=2),
        command(wide, site(), replica="prefill-0", nodes=3, kv_over_nvlink=True),
        command(wide, site(), replica="prefill-0", nodes=3, node=1),
        command(model(quantization="fp8", revision="main"), site(), replica="aggregated-0"),
        command(model(aggregated=tp(16)), site(), replica="aggregated-0", nodes=2, node=1),
        command(replace(pair, kv_offload=TIERS), site(), replica="decode-0", nodes=2),
        VLLM().command(alone_tiered),
        command(
            model(kv_offload=replace(TIERS, shared_gib=500, answers=True)),
            replace(site(), storage=StorageSite(kv="/lustre/kv")),
            replica="aggregated-0",
        ),
    ]
    shown = [placed for name in RECIPES for placed in engine_commands(recipe(name))]
    # `serve` is the name of a subcommand; its parser reads the rest.
    argvs = [[word for word in each.argv[3:] if word != "serve"] for each in made]
    argvs += [_filled_in(command.argv[3:]) for _, _, command in shown]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ],
        input=json.dumps(argvs),
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    read = json.loads(line.removeprefix("READ"))
    prefill, decode, head, second, alone, headless, tiered, only, shared = read[: len(made)]
    for (replica, rank, _), found in zip(shown, read[len(made) :], strict=True):
        assert found["role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[replica.role]
        assert found["headless"] == (replica.nodes.index(rank) not in VLLM().api_nodes(replica))
        assert found["parallel"] == [
            replica.tensor_parallel, replica.data_parallel, replica.expert_parallel
        ]  # fmt: skip
    assert (prefill["role"], decode["role"], alone["role"]) == ("kv_producer", "kv_consumer", None)
    assert (prefill["host"], prefill["port"], prefill["model"]) == ("10.0.0.1", 20001, "/models/llama")
    assert prefill["middleware"] == ["hpcserve.engines.vllm_guard.JobKeyGuard"]
    assert prefill["served"] == ["llama"]
    assert (prefill["seqs"], prefill["prefix"], prefill["overrides"]) == (64, False, {"a": 1})
    assert (prefill["cumem"], head["cumem"]) == (False, True)
    assert [(each["nnodes"], each["headless"], each["hybrid"]) for each in (head, second, headless)] == [
        (2, False, True), (2, False, True), (2, True, False),
    ]  # fmt: skip
    assert headless["model"] == "/models/llama"
    assert [(each["connector"], each["role"]) for each in (tiered, only, shared)] == [
        ("MultiConnector", "kv_consumer"), *[("OffloadingConnector", "kv_both")] * 2,
    ]  # fmt: skip
    assert [only["memory"]] == [f"/dev/shm/{name}" for name in VLLM().shared_memory(alone_tiered)]
