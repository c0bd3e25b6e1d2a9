"""`make demo`, as the README promises it: a sensible answer, KV bytes over NIXL, and nothing left running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_the_demo_answers_through_both_engines_and_leaves_nothing(tmp_path: Path) -> None:
    model = tmp_path / "SmolLM2-135M-Instruct"
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "demo" / "demo.py"), "--model", str(model)],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout
    moved = re.search(r"KV bytes moved by NIXL .*: ([\d,]+)", done.stdout)
    assert moved is not None
    assert int(moved[1].replace(",", "")) > 0
    assert "processes left running: 0" in done.stdout
