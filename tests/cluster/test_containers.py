"""Prefill and decode inside containers on two nodes: Apptainer itself, and pyxis by a stand-in for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import images, paths
from .launched import Launched, Launches
from .pyxis import pyxis
from .testbed import Testbed

MODEL = """\
model: example/nothing-to-load
served_name: fake
engine: fake
walltime: 00:10:00
prefill: {replicas: 1, nodes: 1}
decode: {replicas: 1, nodes: 1}
max_model_len: 4096
"""


def site(launches: Launches, name: str, container: str, setup: str) -> str:
    """A site config of the user's own; the checkout and its environment are bound into the image."""
    directory = launches.cluster.home(launches.user) / ".config/hpcserve/sites"
    if not directory.is_dir():
        launches.cluster.as_user(launches.user, ["mkdir", "-p", str(directory)])
    text = f"""\
name: {name}
extends: test-cluster
container:
  binds: [{paths.MOUNTED}]
{container}
setup:
  python: {paths.PYTHON}
{setup}
"""
    (directory / f"{name}.yaml").write_text(text)
    (directory / f"{name}.yaml").chmod(0o644)
    return name


@pytest.fixture
def apptainer() -> Path:
    if not paths.APPTAINER.exists():
        pytest.skip("no Apptainer: tests/cluster/install_apptainer.sh could not install it on this machine")
    # As udev makes it on any cluster's nodes: Apptainer mounts image files with it.
    os.chmod("/dev/fuse", 0o666)
    return paths.APPTAINER


@pytest.fixture(scope="module")
def sif() -> Path:
    return images.sif(str(paths.APPTAINER))


@pytest.fixture(scope="module")
def sqsh() -> Path:
    return images.squash()


@pytest.fixture
def launched(launches: Launches) -> Iterator[list[Launched]]:
    runs: list[Launched] = []
    yield runs
    for run in runs:
        run.cancel()


def hpcserve_processes(cluster: Testbed) -> dict[str, list[int]]:
    """`agent`, `fake_server` and so on -> the Python processes of hsuser on all nodes."""
    found: dict[str, list[int]] = {}
    for host in cluster.hosts:
        for pid in cluster.processes(host.name):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if "python" not in Path(words[0]).name:
                continue
            for kind in ("agent", "head", "hpcserve.engines.fake_server"):
                if kind in words:
                    found.setdefault(kind, []).append(pid)
    return found


def in_image(pid: int) -> bool:
    """Does the process see the image's /etc/environment?"""
    try:
        return "IMAGE_SAYS=image" in Path(f"/proc/{pid}/root/etc/environment").read_text()
    except FileNotFoundError:
        return False


def serve(
    cluster: Testbed, launches: Launches, launched: list[Launched], site_name: str
) -> dict[str, set[bool]]:
    """Launch, ask, look which processes are in the image, stop, and see that nothing is left."""
    run = launches.launch(MODEL, name=site_name, nodes=2, site=site_name)
    launched.append(run)
    run.wait_ready()
    status, answer = run.request("/completions", {"model": "fake", "prompt": "Hello there", "max_tokens": 8})
    assert status == 200 and answer["usage"]["completion_tokens"] == 8
    assert all(event["ok"] and event["bytes"] > 0 for event in run.events("kv-path"))
    assert len({run.node_of("prefill-0"), run.node_of("decode-0")}) == 2
    where = {kind: {in_image(pid) for pid in pids} for kind, pids in hpcserve_processes(cluster).items()}
    run.stop()
    run.wait_gone()
    assert run.events("stopped"), run.logs()
    for host in cluster.hosts:
        assert cluster.commands_of("hsuser", host.name) == []
    return where


def test_apptainer_serves_from_a_sif(
    cluster: Testbed, launches: Launches, launched: list[Launched], apptainer: Path, sif: Path
) -> None:
    name = site(
        launches,
        "in-apptainer",
        f"  runtime: apptainer\n  image: {sif}",
        # What a module of the node leaves behind, and must not reach the image.
        f"  script: export PATH={apptainer.parent}:$PATH PYTHONHOME=/nowhere",
    )
    where = serve(cluster, launches, launched, name)
    assert where == {kind: {True} for kind in ("agent", "head", "hpcserve.engines.fake_server")}
    assert launched[0].events("rendezvous")[0]["transport"] == "mpi"


def test_engines_alone_in_apptainer(
    cluster: Testbed, launches: Launches, launched: list[Launched], apptainer: Path, sif: Path
) -> None:
    container = f"  runtime: apptainer\n  image: {sif}\n  agent: outside\n  python: {paths.PYTHON}"
    name = site(launches, "engines-apart", container, f"  script: export PATH={apptainer.parent}:$PATH")
    where = serve(cluster, launches, launched, name)
    assert where == {"agent": {False}, "head": {False}, "hpcserve.engines.fake_server": {True}}


@pytest.mark.parametrize("mpi", [True, False], ids=["PMIx hook and MPI", "no hook, no MPI in the image"])
def test_pyxis_serves_from_a_squashfs_file(
    cluster: Testbed, launches: Launches, launched: list[Launched], sqsh: Path, mpi: bool
) -> None:
    setup = "" if mpi else "  env: {MPI4PY_LIBMPI: /nowhere/libmpi.so}"
    name = site(launches, "in-pyxis", f"  runtime: pyxis\n  image: {sqsh}", setup)
    with pyxis(pmi_hook=mpi):
        where = serve(cluster, launches, launched, name)
    assert where == {kind: {True} for kind in ("agent", "head", "hpcserve.engines.fake_server")}
    [run] = launched
    assert run.events("rendezvous")[0]["transport"] == ("mpi" if mpi else "tcp"), run.logs()
    warned = "warning: the rendezvous can't use mpi here" in (run.run_dir / "logs/job.log").read_text()
    assert warned is not mpi
    # Keys and usage of all runs are beside the run's directory, and seen inside.
    assert "can't make" not in (run.run_dir / "logs/router.log").read_text()


def test_the_stand_in_for_pyxis_treats_a_step_as_pyxis_does(cluster: Testbed, sqsh: Path) -> None:
    step = ["srun", "--nodes=1", "--ntasks=1", f"--container-image={sqsh}"]
    env = {"BOTH_SAY": "job", "JOB_SAYS": "job", "LANG": "C.UTF-8"}

    def seen(*flags: str) -> set[str]:
        return set(cluster.as_user("hsuser", [*step, *flags, "/usr/bin/env"], env).stdout.splitlines())

    with pyxis(pmi_hook=False):
        plain = seen()
        assert {"BOTH_SAY=image", "JOB_SAYS=job", "IMAGE_SAYS=image"} <= plain
        assert not any(line.startswith("LANG=") for line in plain)
        assert {"BOTH_SAY=job", "LANG=C.UTF-8"} <= seen("--container-env=BOTH_SAY,LANG")
        missing = cluster.as_user(
            "hsuser", [*step, "--container-mounts=/nowhere:/x", "/usr/bin/env"], check=False
        )
        assert missing.returncode != 0
        script = ["sbatch", f"--container-image={sqsh}", "--wrap=true"]
        assert cluster.as_user("hsuser", script, check=False).returncode != 0
    assert cluster.as_user("hsuser", [*step, "/usr/bin/env"], check=False).returncode != 0
