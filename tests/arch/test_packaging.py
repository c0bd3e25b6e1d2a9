"""templates/ and site-configs/ lie outside the package: a wheel must carry them all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SITES = {path.name for path in (CHECKOUT / "site-configs").glob("*.yaml")}
TEMPLATES = {path.name for path in (CHECKOUT / "templates").iterdir()}
DRY_RUN = ("-m", "hpcserve", "launch", "--dry-run", "--site", "dgx-h100", "--nodes", "2")


def build(out: Path, **environ: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [*command, "--wheel-dir", str(out), str(CHECKOUT)],
        check=True,
        timeout=900,
        env=os.environ | environ,
    )
    (built,) = out.glob("hpcserve-*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def dry_run(python_path: Path, cwd: Path) -> str:
    """A dry run with hpcserve taken from `python_path`, whatever else is installed."""
    model = cwd / "model.yaml"
    model.write_text("model: org/name\nprefill: {nodes: 1}\ndecode: {nodes: 1}\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": str(python_path)}
    command = [sys.executable, *DRY_RUN, str(model)]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(1000)
def test_a_wheel_carries_templates_sites_and_schemas(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"hpcserve/data/site-configs/{name}" for name in SITES} <= names
    assert {f"hpcserve/data/templates/{name}" for name in TEMPLATES} <= names
    assert {"hpcserve/config/schemas/model.schema.json", "hpcserve/config/schemas/site.schema.json"} <= names


@pytest.mark.timeout(1000)
def test_wheel_and_checkout_render_the_same_job(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert dry_run(installed, tmp_path) == dry_run(CHECKOUT, tmp_path)


@pytest.mark.timeout(1000)
def test_a_wheel_carries_what_is_compiled_for_this_platform(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    sources = {path.relative_to(CHECKOUT).with_suffix("") for path in (CHECKOUT / "hpcserve").rglob("*.pyx")}
    assert {name.split(".")[0] for name in names} == {str(source) for source in sources}
    assert "linux" in wheel.name


@pytest.mark.timeout(1000)
def test_a_wheel_can_be_pure_python(tmp_path: Path) -> None:
    pure = build(tmp_path, HPCSERVE_COMPILE="0")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]
