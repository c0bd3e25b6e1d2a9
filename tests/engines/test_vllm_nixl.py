"""NIXL's agents beside engines on the CPU. In a subprocess, like all that needs vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

MAKE = """
import json
from nixl import _api
from hpcserve.engines.vllm_nixl import PAUSE, patient_agents

make, made = _api.nixlBind.nixlAgent, []

def note(name, config):
    made.append([name, config.useProgThread, config.pthrDelay])
    return make(name, config)

_api.nixlBind.nixlAgent = note
config = _api.nixl_agent_config(backends=[])
with patient_agents():
    _api.nixl_agent("engine", config)
_api.nixl_agent("other", config)
print(json.dumps([PAUSE, made]))
"""


@pytest.mark.skipif(
    find_spec("vllm") is None or find_spec("nixl") is None, reason="vLLM and NIXL are not installed"
)
def test_the_thread_of_an_engines_agent_pauses() -> None:
    done = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pause, made = json.loads(done.stdout.splitlines()[-1])
    assert made == [["engine", True, pause], ["other", True, 0]]
    assert pause > 0
