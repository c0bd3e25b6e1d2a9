"""What a node finds out about itself: environment, fabric, ports, names, cores."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hpcserve.config.site import NetworkSite, NodeSite, Site
from hpcserve.errors import JobError, RendezvousError
from hpcserve.node.agent.cores import share_cores, split
from hpcserve.node.agent.environment import engine_environment, scrub
from hpcserve.node.agent.transfer import degraded_anywhere, transfer_devices
from hpcserve.node.discovery.addresses import interfaces, routable, usable
from hpcserve.node.discovery.fabric import HcaPort, distance, hca_ports, nearest
from hpcserve.node.discovery.facts import ModelFact, RankFacts, leaf_switch
from hpcserve.node.discovery.gpus import Gpu, driver_version, find_gpus, nvlink_domain
from hpcserve.node.head.walltime import end_time, parse_end_time
from hpcserve.node.ports import PortRange, ephemeral_range, hold, listen
from hpcserve.node.rank import attempt_of, rank_of
from hpcserve.node.rendezvous.check import check_facts

from .runs import make_plan, replica


def facts(rank: int = 0, **changes: object) -> RankFacts:
    values: dict[str, object] = {
        "rank": rank,
        "node": f"n{rank}",
        "address": f"10.0.0.{rank}",
        "interface": "ib0",
        "machine_id": f"m{rank}",
        "cpus": (0, 1, 2, 3),
        "versions": {"hpcserve": "1"},
        "model": ModelFact(path="m"),
    }
    return RankFacts(**{**values, **changes})  # type: ignore[arg-type]


# Environment


@pytest.mark.parametrize(
    "name",
    [
        "OMPI_COMM_WORLD_RANK",
        "PMIX_NAMESPACE",
        "PMI_RANK",
        "PMI2_RANK",
        "I_MPI_HYDRA_HOST_FILE",
        "MPICH_OFI",
        "PRTE_X",
        "CRAY_PMI_X",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_STEP_ID",
        "SLURM_STEPID",
        "SLURM_TASK_PID",
        "SLURM_MPI_TYPE",
        "SLURM_PMIX_MAPPING_SERV",
        "SLURM_GTIDS",
        "SLURM_CPU_BIND",
        "SLURM_CPU_BIND_LIST",
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "LOCAL_RANK",
        "HPCSERVE_RANK",
    ],
)
def test_launcher_variables_do_not_reach_engines(name: str) -> None:
    assert scrub({name: "1", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "name",
    [
        "UCX_TLS",
        "UCX_NET_DEVICES",
        "NCCL_DEBUG",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "HF_HOME",
        "LD_LIBRARY_PATH",
        "HOME",
        "FI_PROVIDER",
    ],
)
def test_settings_of_user_and_site_reach_engines(name: str) -> None:
    assert scrub({name: "1"}) == {name: "1"}


def test_the_key_is_above_everything_else_in_the_engines_environment() -> None:
    env = engine_environment(
        {"VLLM_API_KEY": "stale", "TMPDIR": "/tmp"},
        {"A": "1", "VLLM_API_KEY": "x"},
        key_variable="VLLM_API_KEY",
        key="right",
        scratch="/scratch",
    )
    assert env == {"VLLM_API_KEY": "right", "TMPDIR": "/scratch", "A": "1"}


# Fabric


def hca(
    sysfs: Path, name: str, pci: str, state: str = "4: ACTIVE", layer: str = "InfiniBand", numa: str = "0"
) -> None:
    device = sysfs / "devices" / pci
    device.mkdir(parents=True, exist_ok=True)
    (device / "numa_node").write_text(numa + "\n")
    port = sysfs / "class" / "infiniband" / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(state + "\n")
    (port / "link_layer").write_text(layer + "\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port.parent.parent / "device").symlink_to(device)


def gpu_device(sysfs: Path, bdf: str, pci: str, numa: str = "0") -> None:
    device = sysfs / "devices" / pci
    device.mkdir(parents=True, exist_ok=True)
    (device / "numa_node").write_text(numa + "\n")
    bus = sysfs / "bus" / "pci" / "devices"
    bus.mkdir(parents=True, exist_ok=True)
    (bus / bdf).symlink_to(device)


def test_ports_are_told_apart_by_state_and_link_layer(tmp_path: Path) -> None:
    hca(tmp_path, "mlx5_0", "pci0000:00/0000:00:01.0/0000:01:00.0")
    hca(tmp_path, "mlx5_1", "pci0000:00/0000:00:02.0/0000:02:00.0", state="1: DOWN")
    hca(tmp_path, "mlx5_2", "pci0000:00/0000:00:03.0/0000:03:00.0", layer="Ethernet")
    hca(tmp_path, "mlx5_10", "pci0000:00/0000:00:04.0/0000:04:00.0", state="2: INIT")
    ports = hca_ports(tmp_path)
    assert [port.name for port in ports] == ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1", "mlx5_10:1"]
    assert [port.name for port in ports if port.active] == ["mlx5_0:1", "mlx5_2:1"]
    assert [port.name for port in ports if port.active and port.infiniband] == ["mlx5_0:1"]
    assert ports[0].rate_gbps == 400
    assert ports[0].numa == 0


def test_a_node_without_adapters_has_none(tmp_path: Path) -> None:
    assert hca_ports(tmp_path) == ()


def test_each_gpu_gets_the_adapter_below_its_own_switch(tmp_path: Path) -> None:
    hca(tmp_path, "mlx5_0", "pci0000:00/0000:00:01.0/0000:10:00.0/0000:11:00.0")
    hca(tmp_path, "mlx5_1", "pci0000:00/0000:00:01.0/0000:20:00.0/0000:21:00.0")
    hca(tmp_path, "mlx5_2", "pci0000:80/0000:80:01.0/0000:90:00.0/0000:91:00.0", numa="1")
    gpu_device(tmp_path, "0000:12:00.0", "pci0000:00/0000:00:01.0/0000:10:00.0/0000:12:00.0")
    gpu_device(tmp_path, "0000:22:00.0", "pci0000:00/0000:00:01.0/0000:20:00.0/0000:22:00.0")
    gpu_device(tmp_path, "0000:a2:00.0", "pci0000:a0/0000:a0:01.0/0000:a2:00.0", numa="1")
    listing = "\n".join(
        f"{index}, GPU-{index}, {bdf}, NVIDIA H100, 81559"
        for index, bdf in enumerate(["00000000:12:00.0", "00000000:22:00.0", "00000000:A2:00.0"])
    )
    found = find_gpus({}, hca_ports(tmp_path), sysfs=tmp_path, listing=listing)
    assert [gpu.hcas for gpu in found] == [("mlx5_0:1",), ("mlx5_1:1",), ("mlx5_2:1",)]
    assert found[0].memory_mib == 81559
    assert found[2].numa == 1


def test_distance_counts_bridges_and_knows_root_complexes() -> None:
    near = distance("/sys/devices/pci0000:00/a/b", "/sys/devices/pci0000:00/a/c")
    far = distance("/sys/devices/pci0000:00/a/b", "/sys/devices/pci0000:00/d/e")
    other = distance("/sys/devices/pci0000:00/a/b", "/sys/devices/pci0000:80/a/b")
    assert near < far < other


def test_a_virtual_adapter_is_near_to_no_gpu(tmp_path: Path) -> None:
    gpu_device(tmp_path, "0000:12:00.0", "pci0000:00/0000:12:00.0")
    virtual = HcaPort(
        hca="rxe0", port=1, link_layer="Ethernet", state="ACTIVE", rate_gbps=1, numa=None, pci=""
    )
    assert nearest(tmp_path / "bus" / "pci" / "devices" / "0000:12:00.0", [virtual]) == ()


def test_visible_devices_limit_and_order_the_gpus() -> None:
    listing = "0, GPU-a, 0:1, X, 1\n1, GPU-b, 0:2, X, 1\n2, GPU-c, 0:3, X, 1"
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-a"}, (), listing=listing)
    assert [(gpu.index, gpu.visible, gpu.uuid) for gpu in found] == [(0, "2", "GPU-c"), (1, "GPU-a", "GPU-a")]
    assert [gpu.visible for gpu in find_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, (), listing="")] == ["0", "1"]
    assert find_gpus({}, (), listing="") == ()


def test_nvlink_domain_comes_from_the_fabric_manager() -> None:
    report = (
        "Fabric\n  State : Completed\n  CliqueId : 3\n  ClusterUUID : 1a2b3c4d-0000-1111-2222-333344445555\n"
    )
    assert nvlink_domain(report) == "1a2b3c4d-0000-1111-2222-333344445555.3"
    assert nvlink_domain("ClusterUUID : N/A\n CliqueId : N/A") is None
    assert nvlink_domain("ClusterUUID : 00000000-0000-0000-0000-000000000000\nCliqueId : 0") is None


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
    ],
)
def test_driver_version_is_read_from_proc(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == "550.54.15"
    assert driver_version(tmp_path / "none") is None


# What engines are told about the fabric


def site(kind: str) -> Site:
    return Site(name="s", node=NodeSite(gpus=2), network=NetworkSite(kind=kind))  # type: ignore[arg-type]


def port(name: str, **changes: object) -> HcaPort:
    values: dict[str, object] = {
        "hca": name,
        "port": 1,
        "link_layer": "InfiniBand",
        "state": "ACTIVE",
        "rate_gbps": 400.0,
        "numa": 0,
        "pci": "/x",
    }
    return HcaPort(**{**values, **changes})  # type: ignore[arg-type]


def test_a_replica_transfers_over_its_own_gpus_adapters() -> None:
    plan = make_plan(1, replica("decode-0", 0, gpus=(1,)), site=site("infiniband"), device="cuda")
    seen = facts(
        hcas=(port("mlx5_0"), port("mlx5_1"), port("mlx5_9", state="DOWN")),
        gpus=(Gpu(index=0, visible="0", hcas=("mlx5_0:1",)), Gpu(index=1, visible="1", hcas=("mlx5_1:1",))),
    )
    devices = transfer_devices(plan, seen, plan.replicas[0])
    assert devices.env["UCX_NET_DEVICES"] == "mlx5_1:1"
    assert devices.env["NCCL_IB_HCA"] == "=mlx5_1:1"
    assert devices.env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "UCX_TLS" not in devices.env
    assert devices.degraded == ()


def test_without_pci_facts_all_active_ports_are_used() -> None:
    plan = make_plan(1, replica("decode-0", 0), site=site("infiniband"), device="cuda")
    seen = facts(hcas=(port("mlx5_0"), port("mlx5_1"), port("mlx5_2", link_layer="Ethernet")))
    assert transfer_devices(plan, seen, plan.replicas[0]).env["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"


def test_a_missing_infiniband_port_is_one_warning_that_names_the_state() -> None:
    plan = make_plan(2, site=site("infiniband"), device="cuda")
    ranks = [facts(rank, hcas=(port("mlx5_0", state="DOWN"),)) for rank in (0, 1)]
    devices = transfer_devices(plan, ranks[0], plan.replicas[0])
    assert devices.env["UCX_TLS"] == "tcp,self,cuda_copy,cuda_ipc"
    [warning] = degraded_anywhere(plan, ranks)
    assert "mlx5_0:1 is DOWN" in warning.message
    assert "(n0, n1)" in warning.message


@pytest.mark.parametrize(
    ("kind", "transports"), [("ethernet", "tcp,self"), ("loopback", "tcp,self,sm"), ("slingshot", "tcp,self")]
)
def test_networks_without_rdma_use_tcp_and_say_so(kind: str, transports: str) -> None:
    plan = make_plan(2, site=site(kind))
    devices = transfer_devices(plan, facts(), plan.replicas[0])
    assert devices.env["UCX_TLS"] == transports
    assert devices.env["UCX_NET_DEVICES"] == "ib0"
    assert len(devices.degraded) == 1


def test_aggregated_replicas_pass_no_kv_blocks_and_are_not_warned_about() -> None:
    plan = make_plan(1, replica("aggregated-0", 0), site=site("ethernet"))
    assert degraded_anywhere(plan, [facts()]) == ()


# Addresses and ports


def test_loopback_and_link_local_addresses_are_refused() -> None:
    assert not usable("127.0.1.1")
    assert not usable("169.254.3.4")
    assert not usable("fe80::1%eth0")
    assert not usable("0.0.0.0")
    assert usable("10.77.0.1")


def test_a_loopback_site_uses_loopback_and_others_never_do() -> None:
    assert routable([], interface=None, loopback=True).address == "127.0.0.1"
    with pytest.raises(RendezvousError, match="which other nodes can't reach"):
        routable([], interface="lo", loopback=False)
    with pytest.raises(RendezvousError, match=r"no IPv4 address on interface 'ib9'; it has .*lo"):
        routable([], interface="ib9", loopback=False)


def test_interfaces_have_their_addresses() -> None:
    assert interfaces()["lo"] == "127.0.0.1"


def test_ports_start_where_the_job_says_and_keep_below_client_ports() -> None:
    ports = PortRange(low=20000, high=20099, seed="a", ephemeral=(20050, 30000))
    order = list(ports.candidates())
    assert sorted(order) == list(range(20000, 20100))
    assert all(first < 20050 for first in order[:50])
    assert order != list(PortRange(low=20000, high=20099, seed="b", ephemeral=(20050, 30000)).candidates())
    assert list(PortRange(low=10, high=19, seed="a").candidates(4)) in ([10, 14], [14, 10])
    assert list(PortRange(low=10, high=12, seed="a").candidates(4)) == []


def test_a_held_port_is_nobody_elses_until_released() -> None:
    ports = PortRange(low=29100, high=29103, seed="x")
    with hold(ports, "127.0.0.1", 2) as first, hold(ports, "127.0.0.1", 2) as second:
        assert {first.first, second.first} == {29100, 29102}
        with pytest.raises(JobError, match=r"no 2 free ports in a row on .* between 29100 and 29103"):
            hold(ports, "127.0.0.1", 2)
        first.release()
        with socket.socket() as engine:
            engine.bind(("127.0.0.1", first.first))


def test_listening_skips_taken_ports() -> None:
    ports = PortRange(low=29110, high=29111, seed="x")
    with listen(ports, "127.0.0.1") as one, listen(ports, "127.0.0.1") as two:
        assert {one.getsockname()[1], two.getsockname()[1]} == {29110, 29111}
        with pytest.raises(JobError, match="no free port"):
            listen(ports, "127.0.0.1")


def test_ephemeral_range_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("32768\t60999\n")
    assert ephemeral_range(tmp_path / "range") == (32768, 60999)
    assert ephemeral_range(tmp_path / "none") is None


# Names and times


def test_rank_comes_from_the_first_launcher_variable() -> None:
    assert rank_of({"HPCSERVE_RANK": "2", "SLURM_PROCID": "3"}) == 2
    assert rank_of({"SLURM_PROCID": "3", "PMIX_RANK": "1"}) == 3
    assert rank_of({"OMPI_COMM_WORLD_RANK": "4"}) == 4
    with pytest.raises(RendezvousError, match="is not a rank"):
        rank_of({"HPCSERVE_RANK": "-1"})


def test_a_requeue_is_another_attempt() -> None:
    assert attempt_of({"SLURM_JOB_ID": "7"}) != attempt_of({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})


def test_end_time_is_read_from_squeue_and_scontrol() -> None:
    one = parse_end_time("2026-01-02T03:04:05\n")
    assert one is not None
    assert one == parse_end_time(
        "JobId=7 StartTime=2026-01-01T00:00:00 EndTime=2026-01-02T03:04:05 Deadline=N/A"
    )
    assert parse_end_time("Unknown") is None
    assert parse_end_time("") is None


def test_end_time_asks_scontrol_when_squeue_does_not_know(tmp_path: Path) -> None:
    for name, text in (("squeue", "exit 1"), ("scontrol", "echo JobId=$4 EndTime=2026-01-02T03:04:05")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/bin", "SLURM_JOB_ID": "7"}
    assert end_time(env) == parse_end_time("2026-01-02T03:04:05")
    assert end_time({**env, "SLURM_JOB_END_TIME": "123"}) == 123
    assert end_time({"PATH": str(tmp_path)}) is None


# Cores


def test_engines_on_one_machine_get_cores_of_their_own() -> None:
    plan = make_plan(2)
    same = [facts(0, machine_id="m", cpus=(0, 1)), facts(1, machine_id="m", cpus=(0, 1))]
    assert share_cores(plan, same) == {(0, "prefill-0"): ((0,),), (1, "decode-0"): ((1,),)}
    apart = [facts(0, cpus=(0, 1)), facts(1, cpus=(0, 1))]
    assert share_cores(plan, apart) == {(0, "prefill-0"): ((0, 1),), (1, "decode-0"): ((0, 1),)}
    assert share_cores(make_plan(2, device="cuda"), same) == {}


def test_cores_are_split_evenly_and_shared_in_turn_when_short() -> None:
    assert split(range(8), 3) == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert split((4, 5), 3) == [(4,), (5,), (4,)]
    assert split((), 2) == [(), ()]


# Do the ranks agree?


def real_plan(nodes: int = 2, **changes: object):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    plan = make_plan(nodes, **changes)
    return replace(plan, model=replace(plan.model, engine="vllm"))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([facts(0)], "missing 1"),
        ([facts(0), facts(1), facts(2)], "not in the plan 2"),
        (
            [facts(0), facts(1, versions={"hpcserve": "2"})],
            "disagree about hpcserve: 1 on rank 0 .n0.; 2 on rank 1 .n1.",
        ),
        (
            [facts(0, versions={"hpcserve": "1", "vllm": "0.32"}), facts(1)],
            "disagree about vllm: 0.32 on rank 0",
        ),
        ([facts(0), facts(1, model=ModelFact(path="m", missing=True))], "no model at m on rank 1 .n1."),
        ([facts(0), facts(1, model=ModelFact(path="x"))], "disagree about the model's path"),
        (
            [facts(0), facts(1, model=ModelFact(path="m", fingerprint="f"))],
            "disagree about the model's config.json",
        ),
    ],
)
def test_ranks_that_disagree_are_named(ranks: list[RankFacts], message: str) -> None:
    with pytest.raises(RendezvousError, match=message):
        check_facts(ranks, real_plan())


def test_too_few_gpus_are_found_before_engines_start() -> None:
    plan = real_plan(1, device="cuda", replicas=(replica("aggregated-0", 0, gpus=(0, 1, 2)),))
    two = facts(0, gpus=(Gpu(index=0, visible="0"), Gpu(index=1, visible="1")))
    with pytest.raises(RendezvousError, match=r"rank 0 \(n0\) sees 2 GPUs, and its engines need 3"):
        check_facts([two], plan)


def test_ranks_that_agree_pass() -> None:
    check_facts([facts(0), facts(1)], real_plan())


@pytest.mark.parametrize(
    ("address", "pattern", "leaf"),
    [
        ("spine.leaf1.n3", "switch.switch.node", "spine.leaf1"),
        ("n3", "node", None),
        ("block1.n3", "block.node", None),
        ("spine.leaf1", "switch.switch.node", None),
    ],
)
def test_the_leaf_switch_comes_from_slurms_topology(address: str, pattern: str, leaf: str | None) -> None:
    environ = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert leaf_switch(environ) == leaf
    assert leaf_switch({}) is None
