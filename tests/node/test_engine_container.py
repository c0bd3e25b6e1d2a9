"""Engines in a container, their agent outside."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.site import ContainerSite, SetupSite
from hpcserve.errors import EngineError
from hpcserve.node.agent.engine_container import contained_argv, contained_environment
from hpcserve.plan.plan import Plan
from hpcserve.render.containers import PACKAGE_IN_IMAGE
from tests.render.cases import RUN_DIR, dgx, plan


def apart(**setup: str) -> Plan:
    container = ContainerSite(runtime="apptainer", image="/i.sif", agent="outside", binds=("$DATA",))
    return plan(replace(dgx(), container=container, setup=SetupSite(env=setup)))


def test_the_command_goes_behind_apptainer_with_the_package_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    environ = {"HPCSERVE_APPTAINER": "/bin/singularity"}
    argv = contained_argv(apart(), RUN_DIR, ["python3", "-m", "vllm"], scratch="/tmp/hs-1", environ=environ)
    assert argv[:2] == ("/bin/singularity", "exec")
    assert argv[-4:] == ("/i.sif", "python3", "-m", "vllm")
    package = Path(sys.modules["hpcserve"].__path__[0])
    assert f"--bind={package}:{PACKAGE_IN_IMAGE}/hpcserve:ro" in argv
    assert {"--pwd=/tmp/hs-1", "--bind=/data", "--bind=/tmp:/tmp"} <= set(argv)


def test_without_the_job_script_there_is_no_runtime() -> None:
    with pytest.raises(EngineError, match="HPCSERVE_APPTAINER"):
        contained_argv(apart(), RUN_DIR, ["python3"], scratch="/s", environ={})


def test_the_nodes_own_libraries_stay_outside() -> None:
    environment = {"PYTHONPATH": "/node", "LD_PRELOAD": "/x.so", "A": "1", "HPCSERVE_APPTAINER": "/a"}
    assert contained_environment(apart(), environment, {}, outside={}) == {
        "A": "1",
        "PYTHONPATH": PACKAGE_IN_IMAGE,
        "PYTHONNOUSERSITE": "1",
    }
    meant = contained_environment(apart(PYTHONPATH="/meant"), {"PYTHONPATH": "/meant"}, {}, outside={})
    assert meant["PYTHONPATH"] == f"{PACKAGE_IN_IMAGE}:/meant"


@pytest.mark.parametrize(
    ("site", "engine", "inside"),
    [({}, "", None), ({"LD_LIBRARY_PATH": "/node"}, "", "/node"), ({}, "/own", "/own")],
)
def test_apptainer_keeps_its_libraries_and_the_engine_gets_those_that_are_meant(
    site: dict[str, str], engine: str, inside: str | None
) -> None:
    added = {"LD_LIBRARY_PATH": engine} if engine else {}
    outside = {"LD_LIBRARY_PATH": "/node"}
    found = contained_environment(apart(**site), {**outside, **added}, added, outside=outside)
    assert found["LD_LIBRARY_PATH"] == "/node"
    assert found.get("APPTAINERENV_LD_LIBRARY_PATH") == inside
    assert found.get("SINGULARITYENV_LD_LIBRARY_PATH") == inside


@pytest.mark.parametrize(
    "module",
    [
        "engines.vllm_guard",
        "engines.sglang_server",
        "engines.tensorrt_llm_server",
        "engines.key_guard",
        "node.preflight.probe",
    ],
)
def test_what_engines_load_from_the_package_needs_the_standard_library_alone(module: str) -> None:
    """-S: without site-packages, as in an image without hpcserve."""
    package = Path(sys.modules["hpcserve"].__path__[0])
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import hpcserve.{module}"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
