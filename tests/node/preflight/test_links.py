"""Rates of links from sysfs, and transports from what UCX prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcserve.node.discovery.fabric import HcaPort
from hpcserve.node.preflight.links import interface_gbps, link_gbs
from hpcserve.node.preflight.transport import last_error, transports

# Printed by UCX of nixl 1.5.1 between two processes on loopback.
PRINTED = """\
[1796080239.495224] [vm:9738 :0]   +--------+-------------+-----------------------------------+
[1796080239.495224] [vm:9738 :0]   | A self cfg#0                                             |
[1796080239.495224] [vm:9738 :0]   | remote memory write by ucp_put* from host memory to host |
[1796080239.495224] [vm:9738 :0]   +--------+-------------+-----------------------------------+
[1796080239.495224] [vm:9738 :0]   | Range  | Description |              Config               |
[1796080239.495224] [vm:9738 :0]   +--------+-------------+-----------------------------------+
[1796080239.495224] [vm:9738 :0]   | 0..inf | zero-copy   | self/memory                       |
[1796080239.495224] [vm:9738 :0]   +--------+-------------+-----------------------------------+
[1796080240.348245] [vm:9738 :0]   +--------+--------------------+------------------------------------+
[1796080240.348245] [vm:9738 :0]   | A inter-node cfg#1                                               |
[1796080240.348245] [vm:9738 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1796080240.348245] [vm:9738 :0]   +--------+--------------------+------------------------------------+
[1796080240.348245] [vm:9738 :0]   | Range  |    Description     |               Config               |
[1796080240.348245] [vm:9738 :0]   +--------+--------------------+------------------------------------+
[1796080240.348245] [vm:9738 :0]   | 0..inf | software emulation | tcp/lo                             |
[1796080240.348245] [vm:9738 :0]   +--------+--------------------+------------------------------------+
[1796080240.348245] [vm:9738 :0]   | A inter-node cfg#1                              |
[1796080240.348245] [vm:9738 :0]   | active message by ucp_am_send* from host memory |
[1796080240.348245] [vm:9738 :0]   |          0 | short              | tcp/lo        |
[1796080240.348245] [vm:9738 :0]   | 16516..inf | multi-frag copy-in | tcp/lo        |
[1796080240.348245] [vm:9738 :0]   +------------+--------------------+---------------+
"""
# The same form with two rails.
RAILS = """\
| 1.0 inter-node cfg#2 |
| remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda |
| Range | Description | Config |
| 0..2K | copy-in | rc_mlx5/mlx5_0:1/path0 |
| 2K..inf | zero-copy | 50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_1:1/path0 |
"""


def hca(name: str, gbps: float) -> HcaPort:
    return HcaPort(
        hca=name, port=1, link_layer="InfiniBand", state="ACTIVE", rate_gbps=gbps, numa=None, pci=""
    )


def interface(sysfs: Path, name: str, speed: str | None, *, over: str | None) -> None:
    """`over` is what shows that there is hardware below: `device`, or `lower_NAME`."""
    directory = sysfs / "class" / "net" / name
    directory.mkdir(parents=True)
    if speed is not None:
        (directory / "speed").write_text(speed + "\n")
    if over is not None:
        (directory / over).mkdir()


def test_the_rate_of_hcas_is_the_sum_of_the_rails() -> None:
    ports = (hca("mlx5_0", 400), hca("mlx5_1", 400), hca("mlx5_2", 0))
    assert link_gbs(["mlx5_0:1"], ports) == 50
    assert link_gbs(["mlx5_0:1", "mlx5_1:1", "cuda"], ports) == 100
    assert link_gbs(["mlx5_2:1"], ports) is None
    assert link_gbs([], ports) is None


@pytest.mark.parametrize(
    ("speed", "over", "rate"),
    [
        ("25000", "device", 25.0),
        ("100000", "lower_eth0", 100.0),
        ("10000", None, None),
        ("-1", "device", None),
        (None, "device", None),
    ],
    ids=["hardware", "a bond or VLAN", "one end of a veth pair", "unknown", "down"],
)
def test_the_rate_of_an_interface(
    tmp_path: Path, speed: str | None, over: str | None, rate: float | None
) -> None:
    interface(tmp_path, "eth9", speed, over=over)
    assert interface_gbps("eth9", tmp_path) == rate
    assert link_gbs(["eth9"], (), tmp_path) == (None if rate is None else rate / 8)


def test_ucxs_table_towards_another_process_tells_the_transport() -> None:
    found = transports(PRINTED)
    assert set(found) == {"read"}
    assert found["read"].text == "tcp/lo (software emulation)"
    assert found["read"].devices == ("lo",)


def test_ucxs_row_for_the_largest_transfers_tells_the_rails() -> None:
    found = transports(PRINTED + RAILS)
    assert found["write"].devices == ("mlx5_0:1", "mlx5_1:1")
    assert found["write"].text.startswith("50% on rc_mlx5/mlx5_0:1/path0 and 50%")
    assert found["read"].devices == ("lo",)


def test_nothing_printed_tells_nothing() -> None:
    assert transports("") == {}
    assert last_error("") is None


def test_the_last_error_ucx_printed() -> None:
    line = (
        "[1.0] [vm:1:0]  sock.c:355  UCX  ERROR   connect(fd=18, dest_addr=10.99.0.2:43031) failed: No route"
    )
    assert last_error(f"x\n{line}\ny") == "connect(fd=18, dest_addr=10.99.0.2:43031) failed: No route"
