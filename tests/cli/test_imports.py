from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "vllm", "mpi4py", "pyarrow", "requests", "rich", "uvloop", "zmq", "numpy", "asyncio"}
_SHOW = (
    "import json, sys\n"
    "from hpcserve.cli.main import main\n"
    "status = main(sys.argv[1:])\n"
    "json.dump([status, sorted({name.partition('.')[0] for name in sys.modules})], sys.stderr)\n"
)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("launch", "--help"),
        ("launch", "--dry-run", "--nodes", "8", "model.yaml"),
        ("launch", "--dry-run", "--json", "--nodes", "8", "model.yaml"),
        ("render", "--nodes", "8", "model.yaml"),
        ("explain", "--nodes", "8", "model.yaml"),
        ("ls",),
    ],
    ids=" ".join,
)
def test_the_login_node_path_imports_nothing_heavy(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "model.yaml").write_text("model: org/tiny\n")
    done = subprocess.run(
        [sys.executable, "-c", _SHOW, *words],
        env={**os.environ, "HOME": str(tmp_path), "HPCSERVE_SITE": "dgx-h100"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert status == 0
    assert not HEAVY & set(modules)


def test_help_does_not_even_read_yaml(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHOW, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    _, modules = json.loads(done.stderr.splitlines()[-1])
    assert not {"yaml", "jinja2", "argparse", "subprocess"} & set(modules)
