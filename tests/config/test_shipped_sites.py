"""The site configs in site-configs/."""

from __future__ import annotations

import datetime
import re
from dataclasses import fields

import pytest

from hpcserve.config.load import Loaded
from hpcserve.config.resources import resources
from hpcserve.config.site import Provenance, Site
from hpcserve.config.sites import find_site

NAMES = sorted(path.stem for path in resources("site-configs").glob("*.yaml"))


def load(name: str) -> Loaded[Site]:
    return find_site(name, environ={}, hostname="x")


@pytest.mark.parametrize("name", NAMES)
def test_every_section_with_facts_says_where_from_and_when(name: str) -> None:
    loaded = load(name)
    for item in fields(loaded.value):
        section = getattr(loaded.value, item.name)
        if isinstance(section, Provenance) and item.name in loaded.origins:
            assert section.source, f"{item.name} has no source"
            datetime.date.fromisoformat(section.checked)


@pytest.mark.parametrize("name", NAMES)
def test_no_device_list_is_shipped(name: str) -> None:
    text = (resources("site-configs") / f"{name}.yaml").read_text()
    values = "\n".join(line.partition("#")[0] for line in text.splitlines())
    assert not re.search(r"mlx5_|NCCL_IB_HCA", values)


@pytest.mark.parametrize("name", NAMES)
def test_no_private_name_of_a_cluster_is_shipped(name: str) -> None:
    slurm = load(name).value.slurm
    assert slurm.account is None and slurm.qos is None
    assert slurm.partition is None or name == "test-cluster"


@pytest.mark.parametrize(
    ("name", "scheduler", "gpus", "arch", "domain"),
    [
        ("local", "local", 0, "x86_64", 1),
        ("generic-slurm", "slurm", 8, "x86_64", 1),
        ("dgx-h100", "slurm", 8, "x86_64", 1),
        ("dgx-b200", "slurm", 8, "x86_64", 1),
        ("gb200-nvl72", "slurm", 4, "aarch64", 18),
        ("test-cluster", "slurm", 4, "x86_64", 1),
    ],
)
def test_the_hardware_of_each_site(name: str, scheduler: str, gpus: int, arch: str, domain: int) -> None:
    site = load(name).value
    assert (site.scheduler, site.node.gpus, site.node.arch, site.node.nvlink_domain_nodes) == (
        scheduler, gpus, arch, domain,
    )  # fmt: skip


def test_the_test_cluster_is_as_its_tests_expect() -> None:
    site = load("test-cluster").value
    assert (site.slurm.partition, site.slurm.gpu_request, site.slurm.exclusive) == ("main", "gres", True)
    assert (site.slurm.mpi, site.slurm.kill_wait, site.node.cpu_engines) == ("pmix", 30, 1)
    assert (site.ports.low, site.ports.high, site.network.kind) == (20000, 29999, "ethernet")


def test_the_local_site_stays_on_loopback() -> None:
    network = load("local").value.network
    assert (network.kind, network.control_interface) == ("loopback", "lo")
    assert network.env["UCX_NET_DEVICES"] == "lo"
