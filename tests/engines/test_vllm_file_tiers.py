"""hpcserve's tiers in files under vLLM's own manager. One subprocess: vLLM takes long to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_one_replica_writes_and_another_reads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engines.file_tiers", str(tmp_path)],
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert json.loads(line.removeprefix("FOUND")) == {
        "refused": "another engine has the same engine_id",
        "left": [],
        # The memory's name in /dev/shm is gone while it is in use: a killed engine leaves nothing.
        "named": [False, False],
        "files": {"kv": 3, "one": 3},
        "found": ["HIT", "HIT"],
        "sources": ["disk", "disk"],
        "same": [True, True],
        # A decode replica gets it from prefill, and does not wait for files.
        "by NIXL": "MISS",
        "damaged": "MISS",
        "removed": True,
    }
    assert "not what was written" in done.stderr
