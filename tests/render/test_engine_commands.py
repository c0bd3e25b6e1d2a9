"""The dry run's engine commands: what runs, with shell variables for what nodes decide."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.model import KvOffloadSpec, ModelSpec, RoleSpec
from hpcserve.errors import ConfigError
from hpcserve.render.engine import engine_commands, render_commands

from .cases import dgx, pair, plan


def test_one_command_per_process_of_a_replica() -> None:
    model = ModelSpec(model="/m", prefill=RoleSpec(tensor_parallel=16), decode=RoleSpec(tensor_parallel=8))
    made = engine_commands(plan(dgx(), model=model, nodes=3))
    assert [(replica.name, rank) for replica, rank, _ in made] == [
        ("prefill-0", 0),
        ("prefill-0", 1),
        ("decode-0", 2),
    ]
    assert "$HEAD_ADDRESS" in made[1][2].argv
    assert "--headless" in made[1][2].argv


def test_every_port_of_sglang_is_a_variable() -> None:
    role = RoleSpec(tensor_parallel=16)
    model = ModelSpec(
        model="/m", engine="sglang", prefill=role, decode=RoleSpec(tensor_parallel=8),
    )  # fmt: skip
    text = render_commands(plan(dgx(), model=model, nodes=3))
    for words in (
        '--dist-init-addr "$ADDRESS:$DIST_PORT"',
        '--dist-init-addr "$HEAD_ADDRESS:$DIST_PORT"',
        '--disaggregation-bootstrap-port "$BOOTSTRAP_PORT"',
        '--nccl-port "$NCCL_PORT"',
        "SGLANG_API_KEY  the job key",
    ):
        assert words in text


def test_the_name_of_a_start_is_a_variable_where_an_engine_needs_it() -> None:
    model = ModelSpec(model="/m", engine="vllm", prefill=RoleSpec(), decode=RoleSpec())
    assert "START" not in render_commands(plan(dgx(), model=model, nodes=2))
    text = render_commands(plan(dgx(), model=replace(model, kv_offload=KvOffloadSpec(cpu_gib=8)), nodes=2))
    assert "#   START" in text and '\\"engine_id\\":\\"$START\\"' in text


def test_a_file_that_an_engine_reads_is_written_by_the_script_as_well(tmp_path: Path) -> None:
    """Executes what is printed, with a program that shows the file it is given."""
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\nwhile [ "$1" != --config ]; do shift; done\ncat "$2"\n')
    show.chmod(0o755)
    model = ModelSpec(
        model="/m", engine="tensorrt-llm", prefill=RoleSpec(), decode=RoleSpec(),
        engine_args={"kv_cache_config": {"dtype": "$HOME `id`"}},
    )  # fmt: skip
    text = render_commands(plan(dgx(), model=model, nodes=2), python=str(show))
    assert "TRTLLM_API_KEY  the job key" in text
    values = {"PATH": os.environ["PATH"], "ADDRESS": "10.0.0.1", "HTTP_PORT": "1", "SCRATCH": str(tmp_path)}
    done = subprocess.run(["bash", "-eu", "-c", text], env=values, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("backend: NIXL") == 2 and done.stdout.count("dtype: $HOME `id`") == 2


def test_a_step_over_several_nodes_is_one_command() -> None:
    """As TensorRT-LLM's own examples start it, from the replica's first node."""
    wide = RoleSpec(tensor_parallel=16)
    model = ModelSpec(model="/m", engine="tensorrt-llm", prefill=wide, decode=wide)
    planned = plan(dgx(), model=model, nodes=4)
    made = engine_commands(planned)
    assert [(replica.name, rank) for replica, rank, _ in made] == [("prefill-0", 0), ("decode-0", 2)]
    text = render_commands(planned)
    assert text.count("  srun \\\n") == 2 and "# decode-0 on nodes 2, 3, slots 0,1,2,3,4,5,6,7" in text
    for words in (
        '"--nodelist=$NODES"', "--ntasks=16", "--ntasks-per-node=8", "--mpi=pmix", "--gres=gpu:8",
        'trtllm-llmapi-launch \\\n  "$PYTHON" -m hpcserve.engines.tensorrt_llm_server',
    ):  # fmt: skip
        assert words in text, text


def test_a_forbidden_flag_is_found_before_anything_is_submitted() -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.port"):
        engine_commands(plan(dgx(), model=pair(engine_args={"port": 1}), nodes=2))


def test_commands_run_by_hand_with_their_variables_and_no_others(tmp_path: Path) -> None:
    """Executes the printed shell with a program that writes down what it was given."""
    (tmp_path / "python it's").write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], {k: os.environ.get(k) for k in ('ODD', 'VLLM_HOST_IP')}]))\n"
    )
    (tmp_path / "python it's").chmod(0o755)
    model = ModelSpec(
        model="/m/it's", prefill=RoleSpec(), decode=RoleSpec(), env={"ODD": "$HOME `id` \"x\" $PORT"},
        engine_args={"chat-template": "$(id)"},
    )  # fmt: skip
    text = render_commands(plan(dgx(), model=model, nodes=2), python=str(tmp_path / "python it's"))
    values = {"ADDRESS": "10.0.0.1", "HTTP_PORT": "1", "SIDE_CHANNEL_PORT": "2", "SCRATCH": "/tmp/a b"}
    done = subprocess.run(
        ["bash", "-eu", "-c", text],
        env={"PATH": os.environ["PATH"], **values},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    argv, env = json.loads(done.stdout.splitlines()[0])
    assert env == {"ODD": '$HOME `id` "x" $PORT', "VLLM_HOST_IP": "10.0.0.1"}
    assert argv[argv.index("--model") + 1] == "/m/it's"
    assert argv[argv.index("--chat-template") + 1] == "$(id)"
    assert argv[argv.index("--port") + 1] == "1"
    assert len(done.stdout.splitlines()) == 2
