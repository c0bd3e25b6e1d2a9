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
from hpcserve.node.discovery.fabric import HcaPort, hca_ports, routable_gid
from hpcserve.node.discovery.facts import ModelFact, RankFacts
from hpcserve.node.discovery.gpus import Gpu, driver_version, find_gpus
from hpcserve.node.discovery.nvlink import Fabric, parse_fabric
from hpcserve.node.discovery.pci import Relation, relation
from hpcserve.node.discovery.slingshot import cxi_devices
from hpcserve.node.discovery.topology import ask_block, block_of, leaf_of
from hpcserve.node.fabric.rails import sort_out
from hpcserve.node.head.walltime import end_time, parse_end_time
from hpcserve.node.ports import PortRange, ephemeral_range, hold, listen
from hpcserve.node.rank import attempt_of, node_names, rank_of
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


def test_relations_are_read_from_the_pcie_tree() -> None:
    gpu = "/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0"
    places = {
        "/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0": Relation.PIX,
        "/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0/0000:1a:00.0/0000:1b:00.0":
            Relation.PXB,
        "/sys/devices/pci0000:15/0000:15:02.0/0000:1c:00.0": Relation.PHB,
        "/sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0": Relation.NODE,
        "/sys/devices/pci0008:15/0008:15:01.0/0008:16:00.0": Relation.NODE,
        "": Relation.NODE,
    }  # fmt: skip
    assert {place: relation(gpu, place, same_numa=True) for place in places} == places
    assert relation(gpu, "/sys/devices/pci0000:80/0000:81:00.0", same_numa=False) == Relation.SYS


def test_a_virtual_adapter_is_used_only_where_there_is_no_other() -> None:
    gpu = Gpu(index=0, visible="0", pci="/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0")
    virtual = port("rxe0", link_layer="Ethernet", pci="")
    real = port("mlx5_0", link_layer="Ethernet", pci="/sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0")
    both = sort_out([gpu], [virtual, real], infiniband=False)
    assert (both.ports, both.left_out) == ((real,), {"rxe0:1": "it is a virtual device"})
    assert sort_out([gpu], [virtual], infiniband=False).of([0]) == (virtual,)


def test_the_gid_of_a_port_is_the_first_of_roce_v2_that_gets_past_a_router(tmp_path: Path) -> None:
    entries = [
        ("fe80::1", "IB/RoCE v1"), ("fe80::1", "RoCE v2"), ("::ffff:10.1.2.3", "IB/RoCE v1"),
        ("2001:db8::1", "RoCE v2"), ("::ffff:169.254.1.1", "RoCE v2"), ("::ffff:10.1.2.3", "RoCE v2"),
        ("::", "RoCE v2"),
    ]  # fmt: skip
    for index, (gid, kind) in enumerate(entries):
        for directory, value in ((tmp_path / "gids", gid), (tmp_path / "gid_attrs" / "types", kind)):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / str(index)).write_text(value + "\n")
    assert routable_gid(tmp_path) == 5
    (tmp_path / "gid_attrs" / "types" / "5").write_text("IB/RoCE v1\n")
    assert routable_gid(tmp_path) == 3
    (tmp_path / "gid_attrs" / "types" / "3").unlink()
    assert routable_gid(tmp_path) is None
    assert routable_gid(tmp_path / "none") is None


def test_older_slingshot_drivers_list_their_devices_elsewhere(tmp_path: Path) -> None:
    assert cxi_devices(tmp_path) == ()
    (tmp_path / "class" / "cxi_user" / "cxi0").mkdir(parents=True)
    assert [(device.name, device.interface) for device in cxi_devices(tmp_path)] == [("cxi0", None)]


def test_visible_devices_limit_and_order_the_gpus() -> None:
    listing = "0, GPU-a, 0:1, X, 1\n1, GPU-b, 0:2, X, 1\n2, GPU-c, 0:3, X, 1"
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-a"}, listing=listing)
    assert [(gpu.index, gpu.visible, gpu.uuid) for gpu in found] == [(0, "2", "GPU-c"), (1, "GPU-a", "GPU-a")]
    assert [gpu.visible for gpu in find_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, listing="")] == ["0", "1"]
    assert find_gpus({}, listing="") == ()


def test_nvlink_domain_comes_from_the_fabric_manager() -> None:
    report = (
        "Fabric\n  State : Completed\n  CliqueId : 3\n  ClusterUUID : 1a2b3c4d-0000-1111-2222-333344445555\n"
    )
    assert parse_fabric(report).domain == "1a2b3c4d-0000-1111-2222-333344445555.3"
    for none in ("N/A", "00000000-0000-0000-0000-000000000000"):
        # NVSwitch inside one machine: its fabric is complete, and joins no nodes.
        inside = (
            f"    Fabric\n        State : Completed\n        CliqueId : 0\n        ClusterUUID : {none}\n"
        )
        assert parse_fabric(inside) == Fabric()
    assert parse_fabric("") == Fabric()
    assert parse_fabric(report + report.replace("CliqueId : 3", "CliqueId : 4")).trouble is not None


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


SWITCH_A = "/sys/devices/pci0000:10/0000:10:01.0"
SWITCH_B = "/sys/devices/pci0000:20/0000:20:01.0"


def test_a_replica_transfers_over_its_own_gpus_adapters() -> None:
    plan = make_plan(1, replica("decode-0", 0, gpus=(1,)), site=site("infiniband"), device="cuda")
    seen = facts(
        hcas=(port("mlx5_0", pci=SWITCH_A + "/2"), port("mlx5_1", pci=SWITCH_B + "/2")),
        gpus=(
            Gpu(index=0, visible="0", pci=SWITCH_A + "/1"),
            Gpu(index=1, visible="1", pci=SWITCH_B + "/1"),
        ),
    )
    devices = transfer_devices(plan, seen, plan.replicas[0], ())
    assert devices.env["UCX_NET_DEVICES"] == "mlx5_1:1"
    assert devices.env["NCCL_IB_HCA"] == "=mlx5_1:1"
    assert devices.env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "UCX_TLS" not in devices.env
    assert devices.degraded == ()


def test_without_pci_facts_all_active_ports_are_used() -> None:
    plan = make_plan(1, replica("decode-0", 0), site=site("infiniband"), device="cuda")
    seen = facts(hcas=(port("mlx5_0"), port("mlx5_1"), port("mlx5_2", link_layer="Ethernet")))
    assert transfer_devices(plan, seen, plan.replicas[0], ()).env["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"


def test_a_missing_infiniband_port_is_one_warning_that_names_the_state() -> None:
    plan = make_plan(2, site=site("infiniband"), device="cuda")
    ranks = [facts(rank, hcas=(port("mlx5_0", state="DOWN"),)) for rank in (0, 1)]
    devices = transfer_devices(plan, ranks[0], plan.replicas[0], ())
    assert devices.env["UCX_TLS"] == "tcp,self,cuda_copy,cuda_ipc"
    [warning] = degraded_anywhere(plan, ranks)
    assert "mlx5_0:1: it is DOWN" in warning.message
    assert "(n0, n1)" in warning.message


@pytest.mark.parametrize(
    ("kind", "transports"), [("ethernet", "tcp,self"), ("loopback", "tcp,self,sm"), ("slingshot", "tcp,self")]
)
def test_networks_without_rdma_use_tcp_and_say_so(kind: str, transports: str) -> None:
    plan = make_plan(2, site=site(kind))
    devices = transfer_devices(plan, facts(), plan.replicas[0], ())
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
        ("b8.tux1", "block.node", "b8"),
        ("spine.leaf1", "switch.switch.node", None),
    ],
)
def test_the_leaf_comes_from_slurms_topology(address: str, pattern: str, leaf: str | None) -> None:
    environ = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert leaf_of(environ) == leaf
    assert leaf_of({}) is None


def test_the_block_is_asked_of_slurm_where_srun_does_not_say_it(tmp_path: Path) -> None:
    listing = (
        "AggregatedBlock=block[1-2] BlockIndex=4 Nodes=node[1-64] BlockSize=64\n"
        "BlockName=block1 BlockIndex=0 Nodes=node[1-32] BlockSize=32\n"
    )
    assert block_of(listing) == "block1"
    assert block_of("SwitchName=s0 Level=0 LinkSpeed=1 Nodes=tux[0-3]\n") is None
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "show topology node3" ] && echo "BlockName=b2 BlockIndex=1 Nodes=node3"\n'
    )
    program.chmod(0o755)
    assert ask_block("node3", {"PATH": str(tmp_path)}) == "b2"
    assert ask_block("node3", {"PATH": "/nonexistent"}) is None


def test_a_heterogeneous_job_ends_when_its_first_component_does() -> None:
    text = "2026-01-02T03:04:05\n2026-01-02T03:04:05\n"
    assert parse_end_time(text) == parse_end_time("2026-01-02T03:04:05")


def test_ranks_of_a_heterogeneous_job_follow_its_components() -> None:
    step = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST": "n[1-3]"}
    groups = {"SLURM_JOB_NODELIST_HET_GROUP_0": "n3", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]"}
    assert node_names({**step, "SLURM_HET_SIZE": "2", **groups}) == ("n3", "n1", "n2")
    assert node_names(step) == ("n1", "n2", "n3")
