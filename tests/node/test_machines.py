"""Discovery on the recorded machines of trees/: rails, NVLink, Slingshot, and the variables that follow."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve import engines
from hpcserve.config.site import NetworkSite, NodeSite, Site
from hpcserve.engines.base import EngineContext
from hpcserve.errors import RendezvousError
from hpcserve.node.agent.transfer import degraded_anywhere, rails_of, transfer_devices
from hpcserve.node.discovery.facts import RankFacts, Roster
from hpcserve.node.discovery.pci import relation
from hpcserve.node.fabric.rails import GpuRails, sort_out
from hpcserve.node.fabric.report import report
from hpcserve.node.preflight.probes import probes_on
from hpcserve.node.rendezvous.check import check_facts
from hpcserve.plan.plan import Plan

from .machine import MACHINES, RAILED, Node, matrix, tree
from .runs import make_plan, replica


def node(tmp_path: Path, name: str, **changes: object) -> Node:
    return Node(root=tmp_path, tree=tree(name) | changes).build()


def plan_of(name: str, nodes: int = 2, gpus: tuple[int, ...] = (0,), **site: object) -> Plan:
    """Prefill on the first node, decode on the others, with real engines."""
    told = Site(
        name="s",
        node=NodeSite(gpus=8, **site),  # type: ignore[arg-type]
        network=NetworkSite(kind=tree(name)["network"]),
    )
    replicas = [replica("prefill-0", 0, gpus=gpus)]
    replicas += [replica(f"decode-{n}", n + 1, gpus=gpus) for n in range(nodes - 1)]
    plan = make_plan(nodes, *replicas, site=told, device="cuda")
    return replace(plan, model=replace(plan.model, engine="vllm"))


def names(text: str) -> list[str]:
    return text.split()


def used(facts: RankFacts, gpu: int, *, infiniband: bool = True) -> list[str]:
    rails = sort_out(facts.gpus, facts.hcas, infiniband=infiniband)
    return [port.name for port in rails.gpus[gpu].ports]


@pytest.mark.parametrize("name", [name for name in MACHINES if "topo" in tree(name)])
def test_relations_are_those_that_nvidia_smi_shows(tmp_path: Path, name: str) -> None:
    """The tree gives the recorded matrix: what is filled in adds nothing to it, and takes nothing away."""
    machine = node(tmp_path, name)
    facts = machine.facts()
    ports = {port.hca: port for port in facts.hcas}
    for (index, hca), told in matrix(machine.tree["topo"]).items():
        gpu, port = facts.gpus[index], ports[hca]
        found = relation(gpu.pci, port.pci, same_numa=gpu.numa == port.numa).name
        if machine.tree["numa_in_topo"] or {found, told} & {"PIX", "PXB", "PHB"}:
            assert found == told, f"GPU{index} to {hca}"


@pytest.mark.parametrize("name", MACHINES)
def test_each_gpu_gets_its_rails_and_no_other_port_is_used(tmp_path: Path, name: str) -> None:
    machine = node(tmp_path, name)
    facts, expected = machine.facts(), machine.tree["expect"]
    rails = rails_of(plan_of(name), facts)
    assert len(facts.gpus) == len(machine.tree["gpus"])
    assert {entry.gpu.index: [p.name for p in entry.ports] for entry in rails.gpus} == {
        gpu: names(text) for gpu, text in expected["rails"].items()
    }
    assert sorted(rails.left_out) == sorted(names(expected["left_out"]))
    assert not [entry for entry in rails.gpus if entry.lost]


@pytest.mark.parametrize("name", RAILED)
def test_the_variables_of_a_replica_name_its_gpus_rails(tmp_path: Path, name: str) -> None:
    machine = node(tmp_path, name)
    facts, expected = machine.facts(), machine.tree["expect"]
    last = len(facts.gpus) - 1
    plan = plan_of(name, gpus=(0, last))
    devices = transfer_devices(plan, facts, plan.replicas[0], ())
    wanted = list(dict.fromkeys(names(expected["rails"][0]) + names(expected["rails"][last])))
    assert devices.env["UCX_NET_DEVICES"] == ",".join(wanted)
    assert devices.env["NCCL_IB_HCA"] == "=" + ",".join(wanted)
    assert devices.env["NCCL_SOCKET_IFNAME"] == "=ib0"
    assert devices.env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "UCX_TLS" not in devices.env
    gid = expected.get("gid_index")
    assert devices.env.get("UCX_IB_GID_INDEX") == (None if gid is None else str(gid))
    assert devices.env.get("NCCL_IB_GID_INDEX") == devices.env.get("UCX_IB_GID_INDEX")
    assert all(setting.why for setting in devices.settings)


# What goes wrong on one node.


@pytest.mark.parametrize(("state", "phys"), [("1: DOWN", "2: Polling"), ("2: INIT", "5: LinkUp"), ("", "")])
def test_a_dead_rail_is_told_and_the_next_nearest_are_used(tmp_path: Path, state: str, phys: str) -> None:
    machine = node(tmp_path, "dgx-h100")
    (machine.port("mlx5_4") / "state").write_text(state)
    (machine.port("mlx5_4") / "phys_state").write_text(phys)
    facts = machine.facts(node="n7")
    assert used(facts, 2) == ["mlx5_0:1", "mlx5_3:1", "mlx5_5:1"]
    assert used(facts, 3) == ["mlx5_5:1"]
    plan = plan_of("dgx-h100", gpus=(2,))
    [warning] = degraded_anywhere(plan, [facts, replace(facts, rank=1)])
    assert warning.message.startswith(
        "GPU 2 goes without mlx5_4:1, and uses mlx5_0:1, mlx5_3:1, mlx5_5:1: it is "
    )
    assert re.search(r"(DOWN \(Polling\)|INIT \(LinkUp\)|unknown) \(n7\)$", warning.message)


def test_a_dead_rail_of_two_is_told_where_other_gpus_have_two(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-a100")
    (machine.port("mlx5_3") / "state").write_text("1: DOWN")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert [[port.name for port in entry.lost] for entry in rails.gpus] == [
        [], [], ["mlx5_3:1"], ["mlx5_3:1"], [], [], [], [],
    ]  # fmt: skip
    assert used(facts, 2) == ["mlx5_2:1"]


def test_second_ports_that_are_cabled_nowhere_are_not_missed(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-a100")
    for hca in ("mlx5_1", "mlx5_3", "mlx5_7", "mlx5_9"):
        (machine.port(hca) / "state").write_text("1: DOWN")
    facts = machine.facts()
    assert degraded_anywhere(plan_of("dgx-a100", nodes=1), [facts]) == ()
    plan = plan_of("dgx-a100", gpus=tuple(range(8)))
    assert degraded_anywhere(plan, [facts, replace(facts, rank=1)]) == ()


def test_a_dead_hca_of_grace_is_told(tmp_path: Path) -> None:
    machine = node(tmp_path, "gb200-nvl72")
    (machine.port("mlx5_0") / "state").write_text("1: DOWN")
    facts = machine.facts()
    assert used(facts, 0) == ["mlx5_1:1"]
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert [[port.name for port in entry.lost] for entry in rails.gpus] == [
        ["mlx5_0:1"],
        ["mlx5_0:1"],
        [],
        [],
    ]


def test_storage_carries_kv_blocks_only_when_all_rails_are_dead(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-h100")
    for hca in ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"):
        (machine.port(hca) / "state").write_text("1: DOWN")
    facts = machine.facts()
    assert used(facts, 0) == ["mlx5_1:1"]
    assert used(facts, 7) == ["mlx5_7:1"]
    plan = plan_of("dgx-h100")
    messages = [entry.message for entry in degraded_anywhere(plan, [facts, replace(facts, rank=1)])]
    assert messages == ["GPU 0 goes without mlx5_0:1, and uses mlx5_1:1: it is DOWN (LinkUp) (n0)"]


def test_a_dead_storage_port_is_not_missed(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-h100")
    for hca in ("mlx5_1", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"):
        # The second socket has no rail left, so its GPUs use those of the first, farther than the storage.
        (machine.port(hca) / "state").write_text("1: DOWN")
    (machine.port("mlx5_7") / "state").write_text("1: DOWN")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert [[port.name for port in entry.lost] for entry in rails.gpus] == [
        [], [], [], [], ["mlx5_6:1"], ["mlx5_9:1"], ["mlx5_10:1"], ["mlx5_11:1"],
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["ibp", "rocep", "rdma", "mlx5_bond_"])
def test_renamed_devices_are_found_all_the_same(tmp_path: Path, prefix: str) -> None:
    changed = tree("dgx-b200")
    renamed = {f"mlx5_{n}": f"{prefix}{n}" for n in range(16)}
    changed["hcas"] = {renamed[name]: hca for name, hca in changed["hcas"].items()}
    facts = Node(root=tmp_path, tree=changed).build().facts()
    for gpu, text in changed["expect"]["rails"].items():
        assert used(facts, gpu) == [f"{renamed[name.partition(':')[0]]}:1" for name in names(text)]


def test_a_port_slower_than_its_neighbour_on_the_switch_is_left_out(tmp_path: Path) -> None:
    machine = node(tmp_path, "hgx-two-fabrics")
    for hca in ("mlx5_7", "mlx5_8"):
        (machine.port(hca) / "link_layer").write_text("InfiniBand")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert used(facts, 4) == ["mlx5_6:1"]
    assert rails.left_out["mlx5_7:1"] == "it runs at 100 Gb/s, and others at 400"


def test_a_rail_that_trained_slower_is_used_and_told(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-h100")
    (machine.port("mlx5_5") / "rate").write_text("100 Gb/sec (4X EDR)")
    facts = machine.facts()
    assert used(facts, 3) == ["mlx5_5:1"]
    plan = plan_of("dgx-h100", gpus=(3,))
    [warning] = degraded_anywhere(plan, [facts, replace(facts, rank=1)])
    assert warning.message == "mlx5_5:1 of GPU 3 runs at 100 Gb/s, others at 400 (n0)"


@pytest.mark.parametrize(
    ("rate", "uses", "told"),
    [
        ("100", ["mlx5_0:1"], "mlx5_0:1 of GPU 0 runs at 100 Gb/s, others at 200"),
        (
            "50",
            ["mlx5_1:1", "mlx5_2:1", "mlx5_3:1"],
            "GPU 0 goes without mlx5_0:1, and uses mlx5_1:1, mlx5_2:1, mlx5_3:1:"
            " it runs at 50 Gb/s, and others at 200",
        ),
    ],
)
def test_a_slower_rail_is_told_where_there_are_no_switches(
    tmp_path: Path, rate: str, uses: list[str], told: str
) -> None:
    machine = node(tmp_path, "gh200-infiniband")
    (machine.port("mlx5_0") / "rate").write_text(f"{rate} Gb/sec")
    facts = machine.facts()
    assert used(facts, 0) == uses
    assert used(facts, 1) == ["mlx5_1:1"]
    plan = plan_of("gh200-infiniband", gpus=(0,))
    [warning] = degraded_anywhere(plan, [facts, replace(facts, rank=1)])
    assert warning.message == f"{told} (n0)"


def test_a_slower_one_of_two_rails_is_missed(tmp_path: Path) -> None:
    machine = node(tmp_path, "gb200-nvl72")
    (machine.port("mlx5_0") / "rate").write_text("200 Gb/sec")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert used(facts, 0) == ["mlx5_1:1"]
    assert [[port.name for port in entry.lost] for entry in rails.gpus] == [["mlx5_0:1"]] * 2 + [[]] * 2


def test_without_switches_slower_ports_are_left_out(tmp_path: Path) -> None:
    machine = node(tmp_path, "gb200-nvl72")
    for hca in ("mlx5_2", "mlx5_3", "mlx5_6", "mlx5_7"):
        (machine.port(hca) / "link_layer").write_text("InfiniBand")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=True)
    assert used(facts, 0) == ["mlx5_0:1", "mlx5_1:1"]
    assert rails.left_out["mlx5_2:1"] == "it runs at 200 Gb/s, and others at 400"


def test_why_a_port_is_left_out(tmp_path: Path) -> None:
    facts = node(tmp_path, "dgx-h100").facts()
    left_out = sort_out(facts.gpus, facts.hcas, infiniband=True).left_out
    assert (
        left_out["mlx5_1:1"]
        == "it shares a PCIe switch with no GPU, so it is there for storage or management"
    )
    assert left_out["mlx5_2:1"] == "its link layer is Ethernet, and the site's network is InfiniBand"


# RoCE.


def test_without_a_routable_address_there_is_no_gid_index_and_a_warning(tmp_path: Path) -> None:
    facts = node(tmp_path, "gh200-ethernet").facts()
    plan = plan_of("gh200-ethernet")
    env = transfer_devices(plan, facts, plan.replicas[0], ()).env
    assert "UCX_IB_GID_INDEX" not in env and "NCCL_IB_GID_INDEX" not in env
    [warning] = degraded_anywhere(plan, [facts, replace(facts, rank=1)])
    assert (
        "mlx5_0:1, mlx5_1:1, mlx5_2:1, mlx5_3:1 has no RoCE v2 GID with a routable address" in warning.message
    )


def test_ports_whose_gid_indices_differ_choose_for_themselves(tmp_path: Path) -> None:
    machine = node(tmp_path, "h200-roce")
    gids = machine.port("mlx5_1")
    (gids / "gids" / "5").write_text("::ffff:20.0.2.1\n")
    (gids / "gid_attrs" / "types" / "5").write_text("RoCE v2\n")
    (gids / "gid_attrs" / "types" / "3").write_text("IB/RoCE v1\n")
    facts = machine.facts()
    assert [port.gid_index for port in facts.hcas[:2]] == [3, 5]
    plan = plan_of("h200-roce", gpus=(0, 1))
    assert "UCX_IB_GID_INDEX" not in transfer_devices(plan, facts, plan.replicas[0], ()).env
    plan = plan_of("h200-roce", gpus=(1,))
    assert transfer_devices(plan, facts, plan.replicas[0], ()).env["UCX_IB_GID_INDEX"] == "5"


def test_an_ethernet_port_without_an_address_is_no_rail_where_others_have_one(tmp_path: Path) -> None:
    machine = node(tmp_path, "h200-roce")
    shutil.rmtree(machine.port("mlx5_3") / "gids")
    facts = machine.facts()
    rails = sort_out(facts.gpus, facts.hcas, infiniband=False)
    assert rails.left_out == {"mlx5_3:1": "it has no RoCE v2 GID with a routable address"}
    assert [port.name for port in rails.gpus[3].lost] == ["mlx5_3:1"]


# NVLink between nodes.


def rack(tmp_path: Path, domains: list[int], **changes: object) -> list[RankFacts]:
    """Trays of GB200 in NVLink domains (cliques) of these numbers."""
    found = []
    for rank, clique in enumerate(domains):
        told = tree("gb200-nvl72") | changes
        told["fabric_report"] = told["fabric_report"].replace("32766", str(clique))
        (tmp_path / str(rank)).mkdir()
        machine = Node(root=tmp_path / str(rank), tree=told).build()
        found.append(machine.facts(rank=rank, node=f"tray{rank}"))
    return found


def test_a_trays_domain_block_and_channel_are_found(tmp_path: Path) -> None:
    machine = node(tmp_path, "gb200-nvl72")
    facts, expected = machine.facts(), machine.tree["expect"]
    assert facts.nvlink_domain == expected["nvlink_domain"]
    assert facts.leaf_switch == expected["leaf"]
    assert facts.imex is not None
    assert (facts.imex.channels, facts.imex.status, facts.imex.trouble) == ((0,), "UP", None)


@pytest.mark.parametrize("name", [name for name in MACHINES if name != "gb200-nvl72"])
def test_other_machines_have_no_nvlink_between_nodes(tmp_path: Path, name: str) -> None:
    facts = node(tmp_path, name).facts()
    assert (facts.nvlink_domain, facts.nvlink_trouble, facts.imex) == (None, None, None)
    env = transfer_devices(
        plan_of(name), facts, plan_of(name).replicas[0], [facts, replace(facts, rank=1)]
    ).env
    assert not [variable for variable in env if "MNNVL" in variable]


def test_kv_blocks_cross_nvlink_within_a_domain(tmp_path: Path) -> None:
    ranks = rack(tmp_path, [1, 1])
    plan = plan_of("gb200-nvl72", nvlink_domain_nodes=18)
    for facts, each in zip(ranks, plan.replicas, strict=True):
        devices = transfer_devices(plan, facts, each, ranks)
        assert devices.env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "y"
        assert devices.kv_over_nvlink
        assert "NCCL_MNNVL_ENABLE" not in devices.env
    assert degraded_anywhere(plan, ranks) == ()


@pytest.mark.parametrize(("domains", "value"), [([1, 1], "y"), ([1, 2], "n")])
def test_the_preflight_measures_with_what_the_engines_get(
    tmp_path: Path, domains: list[int], value: str
) -> None:
    roster = Roster(transport="tcp", attempt="a", seconds=0.0, ranks=tuple(rack(tmp_path, domains)))
    plan = plan_of("gb200-nvl72", nvlink_domain_nodes=18)
    plan = replace(plan, model=replace(plan.model, engine="vllm"))
    for rank, each in enumerate(plan.replicas):
        [placed] = probes_on(plan, roster, rank, {})
        engine = dict(transfer_devices(plan, roster.ranks[rank], each, roster.ranks).env)
        # But torch's memory never crosses NVLink: what is measured then is the network, and said to be.
        assert engine.pop("UCX_CUDA_IPC_ENABLE_MNNVL") == value
        assert placed.environ["UCX_CUDA_IPC_ENABLE_MNNVL"] == "n"
        assert placed.probe.nvlink == (value == "y")
        assert engine.items() <= placed.environ.items()


def test_the_preflight_measures_each_rail_beside_a_gpu_of_its_own(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-h100")
    ranks = tuple(machine.facts(rank=rank, node=f"n{rank}") for rank in range(2))
    roster = Roster(transport="tcp", attempt="a", seconds=0.0, ranks=ranks)
    plan = plan_of("dgx-h100", gpus=(4, 5, 6, 7))
    placed = probes_on(plan, roster, 0, {})
    assert [(entry.probe.gpu, entry.device) for entry in placed] == [
        (4, "cuda:0"),
        (5, "cuda:1"),
        (6, "cuda:2"),
        (7, "cuda:3"),
    ]
    assert [list(entry.probe.rail) for entry in placed] == [used(ranks[0], gpu) for gpu in (4, 5, 6, 7)]
    # As in an engine, each is allowed all of them.
    [allowed] = {entry.probe.devices for entry in placed}
    assert sorted(allowed) == sorted(name for entry in placed for name in entry.probe.rail)
    assert {entry.environ["CUDA_VISIBLE_DEVICES"].count(",") for entry in placed} == {3}
    assert {entry.probe.group for entry in placed} == {0}
    assert len({entry.probe.name for entry in placed}) == 4


def test_gpus_that_share_their_ports_are_one_rail_for_the_preflight(tmp_path: Path) -> None:
    """Four HCAs of a DGX A100 and eight GPUs: two of these have the same nearest ones."""
    facts = node(tmp_path, "dgx-a100").facts()
    roster = Roster(transport="tcp", attempt="a", seconds=0.0, ranks=(facts, replace(facts, rank=1)))
    gpus = tuple(range(8))
    plan = plan_of("dgx-a100", gpus=gpus)
    rails = list(dict.fromkeys(tuple(used(facts, gpu)) for gpu in gpus))
    assert 1 < len(rails) < 8
    placed = probes_on(plan, roster, 0, {})
    assert [entry.probe.rail for entry in placed] == rails
    # Where model.yaml allows one port only, there is one rail.
    one = replace(plan, model=replace(plan.model, env={"UCX_NET_DEVICES": rails[0][0]}))
    [alone] = probes_on(one, roster, 0, {})
    assert (alone.probe.gpu, alone.device, alone.probe.expected) == (None, "cuda:0", (rails[0][0],))


def test_kv_blocks_do_not_cross_nvlink_between_domains(tmp_path: Path) -> None:
    ranks = rack(tmp_path, [1, 1, 2])
    plan = plan_of("gb200-nvl72", nodes=3, nvlink_domain_nodes=18)
    devices = [transfer_devices(plan, ranks[n], plan.replicas[n], ranks) for n in range(3)]
    # UCX asks only whether both ends have NVLink, so one partner in another rack is enough.
    assert [entry.env["UCX_CUDA_IPC_ENABLE_MNNVL"] for entry in devices] == ["n", "y", "n"]
    [told] = [setting for setting in devices[0].settings if setting.name == "UCX_CUDA_IPC_ENABLE_MNNVL"]
    assert "tray2 in 6a130f54-faaa-4b8f-847f-be44ab70f917.2" in told.why
    assert [entry.kv_over_nvlink for entry in devices] == [False, True, False]
    [warning] = degraded_anywhere(plan, ranks)
    assert "in several NVLink domains" in warning.message and "(tray0, tray2)" in warning.message


def test_a_replica_over_nodes_has_nccl_use_nvlink_within_a_domain_only(tmp_path: Path) -> None:
    ranks = rack(tmp_path, [1, 1, 2, 1])
    plan = plan_of("gb200-nvl72", nodes=4)
    near, far = (
        replica("aggregated-0", 0, 1, gpus=(0, 1, 2, 3)),
        replica("aggregated-1", 2, 3, gpus=(0, 1, 2, 3)),
    )
    plan = replace(plan, replicas=(near, far))
    env = transfer_devices(plan, ranks[0], near, ranks).env
    assert (env["NCCL_MNNVL_ENABLE"], env["NCCL_CUMEM_ENABLE"]) == ("1", "1")
    env = transfer_devices(plan, ranks[2], far, ranks).env
    assert env["NCCL_MNNVL_ENABLE"] == "0"
    assert "NCCL_CUMEM_ENABLE" not in env and "UCX_CUDA_IPC_ENABLE_MNNVL" not in env


@pytest.mark.parametrize(
    ("imex", "why"),
    [
        ({"channels": [], "status": "UP"}, "it has no IMEX channel that this job may open"),
        ({"channels": [0], "status": "DOWN"}, "its IMEX domain is DOWN"),
        (
            {"channels": [0], "status": "DEGRADED", "daemon": "WAITING_FOR_PEERS"},
            "its IMEX domain is DEGRADED, and its own daemon WAITING_FOR_PEERS",
        ),
    ],
)
@pytest.mark.parametrize("domain", [18, 1], ids="nvlink_domain_nodes={}".format)
def test_without_imex_nvlink_is_off_and_told_once(
    tmp_path: Path, imex: dict[str, object], why: str, domain: int
) -> None:
    """Also in a job that is larger than a domain, and where the site says nothing of domains."""
    ranks = rack(tmp_path, [1, 1, 1], imex=imex)
    plan = plan_of("gb200-nvl72", nodes=3, nvlink_domain_nodes=domain)
    for facts, each in zip(ranks, plan.replicas, strict=True):
        devices = transfer_devices(plan, facts, each, ranks)
        assert devices.env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "n"
    [warning] = degraded_anywhere(plan, ranks)
    assert warning.message == f"NVLink to other nodes is not used: {why} (tray0, tray1, tray2)"


def test_somebody_elses_dead_node_in_the_domain_leaves_nvlink_on(tmp_path: Path) -> None:
    ranks = rack(tmp_path, [1, 1], imex={"channels": [0], "status": "DEGRADED"})
    plan = plan_of("gb200-nvl72", nvlink_domain_nodes=18)
    devices = transfer_devices(plan, ranks[0], plan.replicas[0], ranks)
    assert devices.env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "y"
    assert not degraded_anywhere(plan, ranks)


def test_a_daemon_that_may_not_be_asked_leaves_it_to_the_channels(tmp_path: Path) -> None:
    machine = node(tmp_path, "gb200-nvl72")
    program = tmp_path / "bin" / "nvidia-imex-ctl"
    program.write_text("#!/bin/sh\necho denied >&2\nexit 1\n")
    imex = machine.facts().imex
    assert imex is not None
    assert (imex.status, imex.trouble) == (None, None)


@pytest.mark.parametrize(
    ("old", "new", "trouble"),
    [
        ("Healthy", "Unhealthy", "health Unhealthy"),
        ("State                             : Completed", "State : In Progress", "state In Progress"),
        ("Status                            : Success", "Status : Fail", "status Fail"),
    ],
)
def test_a_fabric_that_is_not_whole_joins_nothing(tmp_path: Path, old: str, new: str, trouble: str) -> None:
    told = tree("gb200-nvl72")
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    whole = Node(root=tmp_path / "0", tree=told).build().facts(node="tray0")
    broken = tree("gb200-nvl72")
    broken["fabric_report"] = broken["fabric_report"].replace(old, new)
    facts = Node(root=tmp_path / "1", tree=broken).build().facts(rank=1, node="tray1")
    assert (facts.nvlink_domain, facts.nvlink_trouble) == (None, trouble)
    plan = plan_of("gb200-nvl72", nvlink_domain_nodes=18)
    devices = transfer_devices(plan, whole, plan.replicas[0], [whole, facts])
    assert devices.env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "n"
    [warning] = degraded_anywhere(plan, [whole, facts])
    assert warning.message == f"NVLink does not reach other nodes: its fabric has {trouble} (tray1)"


def test_two_nodes_whose_fabric_is_not_whole_do_not_try_it(tmp_path: Path) -> None:
    """UCX's own default tries NVLink wherever the fabric says Completed."""
    told = tree("gb200-nvl72")["fabric_report"].replace("Healthy", "Unhealthy")
    ranks = rack(tmp_path, [1, 1], fabric_report=told)
    plan = plan_of("gb200-nvl72")
    devices = transfer_devices(plan, ranks[0], plan.replicas[0], ranks)
    assert devices.env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "n"
    assert not devices.kv_over_nvlink
    wide = replica("aggregated-0", 0, 1)
    env = transfer_devices(replace(plan, replicas=(wide,)), ranks[0], wide, ranks).env
    assert env["NCCL_MNNVL_ENABLE"] == "0"


def test_what_the_site_sets_decides_whether_kv_crosses_nvlink(tmp_path: Path) -> None:
    ranks = rack(tmp_path, [1, 1])
    plan = plan_of("gb200-nvl72")
    network = NetworkSite(kind="infiniband", env={"UCX_CUDA_IPC_ENABLE_MNNVL": "n"})
    plan = replace(plan, site=replace(plan.site, network=network))
    assert not transfer_devices(plan, ranks[0], plan.replicas[0], ranks).kv_over_nvlink


def test_kv_that_falls_back_to_tcp_is_told_where_nccl_has_nvlink(tmp_path: Path) -> None:
    """Prefill and decode are each over two trays of a rack of its own, and InfiniBand is down."""
    ranks = [
        replace(facts, hcas=tuple(replace(port, state="DOWN") for port in facts.hcas))
        for facts in rack(tmp_path, [1, 1, 2, 2])
    ]
    plan = plan_of("gb200-nvl72", nodes=4)
    pools = (replica("prefill-0", 0, 1), replica("decode-0", 2, 3))
    plan = replace(plan, replicas=pools)
    env = transfer_devices(plan, ranks[0], pools[0], ranks).env
    assert env["NCCL_MNNVL_ENABLE"] == "1"
    assert env["UCX_CUDA_IPC_ENABLE_MNNVL"] == "n"
    assert env["UCX_TLS"].startswith("tcp")
    messages = [warning.message for warning in degraded_anywhere(plan, ranks)]
    assert any("no active infiniband port, so KV blocks cross TCP" in message for message in messages), (
        messages
    )


# Slingshot.


def test_slingshot_adapters_are_found(tmp_path: Path) -> None:
    machine = node(tmp_path, "gh200-slingshot")
    found = machine.facts().cxis
    assert [device.name for device in found] == names(machine.tree["expect"]["cxis"])
    assert [(device.interface, device.numa) for device in found] == [(f"hsn{n}", n) for n in range(4)]


def test_a_slingshot_cluster_that_nobody_described_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    facts = node(tmp_path, "gh200-slingshot").facts(node="nid1")
    plan = plan_of("gh200-slingshot")
    with pytest.raises(
        RendezvousError, match=r"ranks 0 \(nid1\), 1 \(nid1\): Slingshot adapters \(cxi0, "
    ) as raised:
        check_facts([facts, replace(facts, rank=1)], plan)
    hint = str(raised.value.hint)
    assert "LIBFABRIC" in hint and "1.21" in hint and "job_vni" in hint and "kind: slingshot" in hint


def test_slingshot_beside_infiniband_is_no_obstacle(tmp_path: Path) -> None:
    facts = node(tmp_path, "gh200-infiniband", cxis=tree("gh200-slingshot")["cxis"]).facts()
    check_facts([facts, replace(facts, rank=1)], plan_of("gh200-infiniband"))


def test_aggregated_replicas_may_run_on_slingshot(tmp_path: Path) -> None:
    facts = node(tmp_path, "gh200-slingshot").facts()
    plan = replace(plan_of("gh200-slingshot"), replicas=(replica("aggregated-0", 0, 1),))
    check_facts([facts, replace(facts, rank=1)], plan)
    [warning] = degraded_anywhere(plan, [facts, replace(facts, rank=1)])
    assert "no active infiniband port, so collectives cross TCP" in warning.message
    assert "Slingshot adapters cxi0, cxi1, cxi2, cxi3" in warning.message


# What is told about it.


def test_the_report_tells_what_is_used_and_why(tmp_path: Path) -> None:
    machine = node(tmp_path, "dgx-h100")
    (machine.port("mlx5_4") / "state").write_text("1: DOWN")
    facts = machine.facts()
    plan = plan_of("dgx-h100", gpus=(2,))
    network = NetworkSite(kind="infiniband", env={"UCX_TLS": "rc,cuda_copy", "GLOO_SOCKET_IFNAME": "ib9"})
    model = replace(plan.model, env={"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret"})
    plan = replace(plan, site=replace(plan.site, network=network), model=model)
    told = report(plan, [facts, replace(facts, rank=1, node="n1")])
    assert json.loads(json.dumps(told)) == told
    gpu = told["nodes"][0]["gpus"][2]
    assert gpu["lost"] == ["mlx5_4:1: it is DOWN (LinkUp)"]
    assert (gpu["relation"], gpu["numa"], gpu["ports"]) == ("NODE", 0, ["mlx5_0:1", "mlx5_3:1", "mlx5_5:1"])
    ports = {port["name"]: port for port in told["nodes"][0]["ports"]}
    assert (ports["mlx5_0:1"]["used"], ports["mlx5_0:1"]["why"]) == (True, "a rail")
    assert (ports["mlx5_1:1"]["used"], ports["mlx5_1:1"]["rate_gbps"]) == (False, 400.0)
    assert "storage or management" in ports["mlx5_1:1"]["why"]
    [prefill] = [entry for entry in told["replicas"] if entry["replica"] == "prefill-0"]
    settings = {entry["name"]: (entry["value"], entry["why"]) for entry in prefill["settings"]}
    assert settings["UCX_NET_DEVICES"] == (
        "mlx5_0:1,mlx5_3:1,mlx5_5:1",
        "active ports nearest to its GPUs by PCIe: GPU 2 NODE mlx5_0:1,mlx5_3:1,mlx5_5:1",
    )
    assert settings["UCX_TLS"] == ("rc,cuda_copy", "`network.env` of site s")
    assert settings["NCCL_DEBUG"] == ("INFO", "`env` of model.yaml")
    assert settings["GLOO_SOCKET_IFNAME"][0] == "ib9"
    assert settings["GLOO_SOCKET_IFNAME"][1].startswith("`network.env` of site s; derived was ib0:")
    assert "HF_TOKEN" not in settings


def test_what_is_told_is_what_the_engine_gets(tmp_path: Path) -> None:
    """The variables of the report are those of the command, the site's and the model's included."""
    ranks = rack(tmp_path, [1, 1])
    plan = plan_of("gb200-nvl72")
    network = NetworkSite(kind="infiniband", env={"UCX_TLS": "all"})
    plan = replace(
        plan,
        site=replace(plan.site, network=network),
        model=replace(plan.model, env={"UCX_LOG_LEVEL": "info"}),
    )
    for facts, each in zip(ranks, plan.replicas, strict=True):
        [told] = [entry for entry in report(plan, ranks)["replicas"] if entry["replica"] == each.name]
        devices = transfer_devices(plan, facts, each, ranks)
        context = EngineContext(
            plan=plan, replica=each, node=0, address=facts.address, head_address=facts.address,
            ports={"http": "1", "side_channel": "2"}, model_path="m", fabric_env=devices.env,
            kv_over_nvlink=devices.kv_over_nvlink,
        )  # fmt: skip
        made = engines.get("vllm").command(context)
        assert {entry["name"]: entry["value"] for entry in told["settings"]} == {
            name: value for name, value in made.env.items() if name.startswith(("UCX_", "NCCL_", "GLOO_"))
        }
        assert told["kv_over_nvlink"] and "--enable-cumem-allocator" in made.argv


DOCS = Path(__file__).parents[2] / "docs" / "fabric.md"


def documented(machine: Node, name: str) -> str:
    """The machine's line in docs/fabric.md, from what discovery finds."""
    facts = machine.facts()
    rails = rails_of(plan_of(name), facts)
    first, last = rails.gpus[0], rails.gpus[-1]

    def uses(entry: GpuRails) -> str:
        near = "" if entry.relation is None or not entry.ports else f" ({entry.relation.name})"
        return (", ".join(f"`{port.hca}`" for port in entry.ports) or "nothing") + near

    left_out = ", ".join(f"`{port.removesuffix(':1')}`" for port in rails.left_out) or "none"
    plan = plan_of(name)
    ranks = [facts, replace(facts, rank=1, node="n1")]
    try:
        check_facts(ranks, plan)
    except RendezvousError:
        also = "prefill and decode on several nodes are refused"
    else:
        usual = ("UCX_NET_DEVICES", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        env = transfer_devices(plan, facts, plan.replicas[0], ranks).env
        also = ", ".join(f"`{key}={value}`" for key, value in env.items() if key not in usual) or "none"
    gpus = f"{facts.gpus[0].name} × {len(facts.gpus)}"
    return f"| `{name}` | {gpus} | {uses(first)} | {uses(last)} | {left_out} | {also} |"


@pytest.mark.parametrize("name", MACHINES)
def test_the_documented_table_is_what_is_found(tmp_path: Path, name: str) -> None:
    assert documented(node(tmp_path, name), name) in DOCS.read_text().splitlines()
