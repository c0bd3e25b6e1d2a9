"""The real SGLang accepts what the adapter makes: its own ServerArgs read every command line.

SGLang's wheel for GPUs pulls in several GB, but its parser needs little of that: numpy, torch, triton and
such, which vLLM's build for CPUs has brought already, and three small packages. So `make sglang` puts the
wheel and those three into `.sglang`, without their dependencies, and this test reads with the interpreter and
the packages of `.venv` and, behind them, that folder. Nothing of SGLang is replaced. A flag that SGLang
renames fails here by its name. In a subprocess, because what SGLang patches in other packages is not for
these tests.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hpcserve.config.model import RoleSpec
from hpcserve.engines import sglang_host_kv
from hpcserve.engines.base import EngineCommand
from tests.plan.cases import model, site, tp

from .cases import command

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("HPCSERVE_SGLANG", CHECKOUT / ".sglang"))

READ = """
import json, sys
sys.path.append(sys.argv[1])
import argparse
from sglang.srt.server_args import ServerArgs, _plain
from sglang.version import __version__
from hpcserve.engines.sglang_server import Secret

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
read = []
for argv in json.load(sys.stdin):
    try:
        known, unknown = parser.parse_known_args(argv)
    except SystemExit:
        sys.exit(f"SGLang {__version__} refuses {argv}")
    if unknown:
        sys.exit(f"SGLang {__version__} does not know {unknown}")
    args = ServerArgs.from_cli_args(known)
    read.append({name: value for name, value in vars(known).items()})
args.api_key = Secret("the-key")
shown = repr(args) + repr(_plain(args))
print("READ" + json.dumps({
    "version": __version__, "read": read, "leaks": "the-key" in shown, "sends": f"Bearer {args.api_key}",
    "flags": sorted(flag for action in parser._actions for flag in action.option_strings),
}, default=str))
"""


# The module of the HTTP server needs torchvision and more; what is wanted of it is looked for in its source.
START = """
import json, os, sys, types
sys.path.append(sys.argv[1])
server = types.ModuleType("sglang.srt.entrypoints.http_server")
guards = []
server.app = types.SimpleNamespace(add_middleware=guards.append)
sys.modules[server.__name__] = server
from sglang import launch_server
from hpcserve.engines import sglang_server

def run(server_args):
    print("RAN" + json.dumps({
        "key": f"{server_args.api_key}", "model": server_args.model_path, "shown": repr(server_args),
        "guards": [guard.__name__ for guard in guards], "rust": os.environ.get("SGLANG_RUST_SERVER"),
    }))

launch_server.run_server = run
sglang_server.main(json.load(sys.stdin))
"""


def cases() -> Iterator[tuple[str, EngineCommand]]:
    options = {"mem-fraction-static": 0.8, "disable_cuda_graph": True, "page-size": 64}
    pair = model(engine="sglang", prefill=tp(4), decode=tp(4), engine_args=options)
    wide = model(
        engine="sglang",
        prefill=tp(4, data_parallel=4, expert_parallel=True),
        decode=tp(8, pipeline_parallel=1),
    )
    long = model(engine="sglang", aggregated=tp(8, pipeline_parallel=2))
    copies = model(engine="sglang", aggregated=tp(2, data_parallel=4))
    named = model(engine="sglang", quantization="fp8", revision="main", dtype="bfloat16", max_model_len=4096)
    yield "prefill", command(pair, site(), replica="prefill-0", nodes=2)
    yield "decode", command(pair, site(), replica="decode-0", nodes=2)
    yield "head", command(wide, site(), replica="prefill-0", nodes=3)
    yield "second", command(wide, site(), replica="prefill-0", nodes=3, node=1)
    yield "stages", command(long, site(), replica="aggregated-0", nodes=2, node=1)
    yield "copies", command(copies, site(), replica="aggregated-0")
    yield "named", command(named, site(), replica="aggregated-0")
    yield "cpu", command(model(engine="sglang", aggregated=RoleSpec()), site(gpus=0), replica="aggregated-0")
    hosts = model(engine="sglang", prefill=RoleSpec(), decode=RoleSpec())
    yield "cpu decode", command(hosts, site(gpus=0), replica="decode-0", nodes=2)


@cache
def read() -> dict[str, Any]:
    """What SGLang understood: `read` by case, and its own account of itself."""
    if not (FOLDER / "sglang").is_dir():
        pytest.fail(f"SGLang is not in {FOLDER}: run `make sglang`")
    names, made = zip(*cases(), strict=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(FOLDER)],
        input=json.dumps([list(each.argv[3:]) for each in made]),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    found: dict[str, Any] = json.loads(line.removeprefix("READ"))
    return {**found, "read": dict(zip(names, found["read"], strict=True))}


def test_it_is_the_version_that_the_adapter_was_written_for() -> None:
    assert read()["version"] == "0.5.23"


@pytest.mark.parametrize(
    ("case", "understood"),
    [
        ("prefill", {
            "model_path": "/models/llama", "served_model_name": "llama", "host": "10.0.0.1",
            "disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl",
            "disaggregation_bootstrap_port": 20001, "tp_size": 4, "dp_size": 1, "nnodes": 1,
            "enable_metrics": True, "enable_cache_report": True, "mem_fraction_static": 0.8,
            "page_size": 64, "uvicorn_access_log_exclude_prefixes": ["/ready", "/metrics"],
            "port": 20002, "nccl_port": 20003, "dist_init_addr": None, "api_key": None,
        }),
        ("decode", {
            "disaggregation_mode": "decode", "disaggregation_transfer_backend": "nixl",
            "disaggregation_bootstrap_port": 8998, "kv_events_config": None,
        }),
        ("head", {
            "tp_size": 16, "attn_dp_size": 4, "dp_size": 1, "ep_size": 16, "nnodes": 2, "node_rank": 0,
            "nccl_port": None, "dist_init_addr": "10.0.0.1:20002",
        }),
        ("second", {
            "tp_size": 16, "nnodes": 2, "node_rank": 1, "host": "10.0.0.2",
            "dist_init_addr": "10.0.0.1:20002",
        }),
        ("stages", {"tp_size": 8, "pp_size": 2, "nnodes": 2, "node_rank": 1}),
        ("copies", {"tp_size": 2, "dp_size": 4, "attn_dp_size": 1, "nccl_port": None}),
        ("named", {
            "quantization": "fp8", "revision": "main", "dtype": "bfloat16", "context_length": 4096,
            "disaggregation_mode": "null",
        }),
        ("cpu", {
            "device": "cpu", "tp_size": 1, "attention_backend": "torch_native", "max_total_tokens": 32768,
            "disable_overlap_schedule": False,
        }),
        ("cpu decode", {
            "device": "cpu", "disaggregation_mode": "decode", "disable_overlap_schedule": True,
            "disaggregation_decode_retraction_backup": "cpu_tensor",
        }),
    ],
)  # fmt: skip
def test_sglang_reads_every_command_line(case: str, understood: dict[str, Any]) -> None:
    found = read()["read"][case]
    assert {name: found[name] for name in understood} == understood


def test_its_events_go_where_they_are_read() -> None:
    assert json.loads(read()["read"]["prefill"]["kv_events_config"]) == {
        "publisher": "zmq",
        "endpoint": "ipc:///tmp/job/kv.inproc",
        "replay_endpoint": "ipc:///tmp/job/kv-replay.inproc",
    }


def test_reserved_flags_are_flags() -> None:
    """A reserved name that SGLang has dropped or renamed would guard nothing."""
    from hpcserve.engines.sglang import RESERVED

    assert {f"--{name}" for name in RESERVED} <= set(read()["flags"])


def test_it_is_started_with_the_key_behind_the_guard() -> None:
    """By our module, with SGLang's own start up to where it would load a model."""
    made = command(model(engine="sglang"), site(), replica="aggregated-0")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START, str(FOLDER)],
        input=json.dumps(list(made.argv[3:])),
        env={**os.environ, "SGLANG_API_KEY": "the-key", "SGLANG_RUST_SERVER": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RAN")]
    ran = json.loads(line.removeprefix("RAN"))
    assert (ran["key"], ran["model"], ran["rust"]) == ("the-key", "/models/llama", None)
    assert ran["guards"] == ["JobKeyGuard"]
    assert "the-key" not in ran["shown"] + done.stderr
    source = ast.parse((FOLDER / "sglang/srt/entrypoints/http_server.py").read_text(encoding="utf-8"))
    assert "app = FastAPI(" in [ast.unparse(node)[:14] for node in source.body]


def test_kv_of_the_host_is_told_where_sglang_asks_of_which_kind_it_is() -> None:
    """The plugin's entry point is that of SGLang's group, and the function that it goes around is there."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (path,) = project["entry-points"]["sglang.srt.plugins"].values()
    assert path == f"{sglang_host_kv.__name__}:{sglang_host_kv.install.__name__}"
    assert '"sglang.srt.plugins"' in (FOLDER / "sglang/srt/plugins/__init__.py").read_text()
    module, name = sglang_host_kv.NORMALIZE.rsplit(".", 1)
    source = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (function,) = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert [argument.arg for argument in function.args.args] == ["kinds", "expected_len"]
    told = sglang_host_kv.on_host(lambda kinds, length: kinds[:length], None, 3)
    assert told == ["DRAM"] * 3


def test_nixls_thread_sleeps_where_the_cpu_computes() -> None:
    """NIXL's class takes the other delay, and its Python API makes agents with what the plugin puts there."""
    from nixl import _api

    given = _api.nixlBind.nixlAgentConfig
    made = sglang_host_kv.calm(given)()
    made.pthrDelay = 0
    assert made.pthrDelay == given.pthrDelay.__get__(made) == sglang_host_kv.LOOK_EVERY_US
    source = inspect.getsource(_api.nixl_agent.__init__)
    assert "agent_config = nixlBind.nixlAgentConfig()" in source and "pthrDelay = 0" in source
    _api.nixlBind.nixlAgent("of a test", made)


def test_the_key_is_sent_and_not_shown() -> None:
    """SGLang logs its arguments, as it prints them and as plain values."""
    assert (read()["leaks"], read()["sends"]) == (False, "Bearer the-key")


def test_kv_managers_that_can_change_their_role_are_others_than_nixls() -> None:
    """When NIXL's can, docs/engines.md is wrong, and replicas could move between prefill and decode."""
    folder = FOLDER / "sglang/srt/disaggregation"
    able = set()
    for path in folder.glob("*/conn.py"):
        classes = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)]
        if "supports_role_switch = True" in [ast.unparse(line) for each in classes for line in each.body]:
            able.add(path.parent.name)
    assert able == {"mooncake", "mori"}
    assert "not km.supports_role_switch" in (folder / "role_switch.py").read_text(encoding="utf-8")
