"""The cluster tests' fixtures. They skip, saying why, where they can't run.

HPCSERVE_REQUIRE_CLUSTER=1 turns that skip into a failure: .ci/run sets it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import paths, testbed
from .launched import Launches
from .testbed import Testbed

_PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "nsenter", "unshare", "setpriv", "useradd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def _missing() -> str | None:
    """Why this machine can't be a cluster, or None."""
    if os.geteuid() != 0:
        return "building a cluster of network namespaces needs root"
    if not Path("/etc/debian_version").exists():
        return "the cluster is built from Debian's Slurm packages, and this is not Debian"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; run tests/cluster/install.sh"
    if not (paths.CHECKOUT / ".venv/bin/python").exists():
        return "the nodes run the checkout's own .venv, and there is none; run `make venv`"
    return None


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Testbed]:
    reason = _missing()
    if reason and os.environ.get("HPCSERVE_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"HPCSERVE_REQUIRE_CLUSTER=1, but {reason}")
    if reason:
        pytest.skip(reason)
    with testbed.machine_lock(seconds=60):
        already = testbed.running()
        if already is not None:  # somebody's `testbed up`: use it and leave it
            already.cancel_jobs()
            yield already
            return
        try:
            yield testbed.up()
        finally:
            testbed.down()


@pytest.fixture
def cluster(_cluster: Testbed) -> Iterator[Testbed]:
    """Four idle nodes; what a test leaves (jobs, dead nodes, cut links) is put right after it."""
    yield _cluster
    _cluster.repair()
    _cluster.cancel_jobs()
    _cluster.wait_until_idle()


@pytest.fixture
def launches(cluster: Testbed) -> Iterator[Launches]:
    """`hpcserve` as hsuser on the login node; every run it launches is stopped afterwards."""
    yield Launches(cluster, "hsuser")
