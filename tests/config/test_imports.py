"""Login nodes have slow file systems: reading a configuration imports PyYAML and little else."""

from __future__ import annotations

import json
import subprocess
import sys

ALLOWED = {"hpcserve", "yaml", "_yaml"}
CYTHON = ("cython_runtime", "_cython_")  # come with _yaml


def test_the_loaders_import_nothing_but_yaml_and_the_standard_library() -> None:
    program = (
        "import sys, json; before = set(sys.modules);"
        "import hpcserve.config.load, hpcserve.config.sites, hpcserve.config.model_facts;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    extra = {name for name in json.loads(output) if name not in sys.stdlib_module_names} - ALLOWED
    assert {name for name in extra if not name.startswith(CYTHON)} == set()
