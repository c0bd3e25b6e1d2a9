"""What a request becomes: which replica on which GPUs of which node, and why."""

# A layout is one line.
# ruff: noqa: E501
from __future__ import annotations

from dataclasses import replace

import pytest

from hpcserve.config.model import ModelSpec, RoleSpec, WorkloadSpec
from hpcserve.config.site import NodeSite, StorageSite
from hpcserve.plan.plan import Explanation, Plan
from hpcserve.plan.ratio import prefill_share, split_nodes, split_slots

from .cases import DEEPSEEK, LLAMA_8B, LLAMA_70B, layout, model, plan, site, tp

LONG = WorkloadSpec(input_tokens=8000, output_tokens=250)
LAYOUTS = {
    "one node is aggregated unless model.yaml says otherwise": (
        plan(), ["0: aggregated-0[0-7]"]
    ),
    "two nodes are one of each": (
        plan(nodes=2), ["0: prefill-0[0-7]", "1: decode-0[0-7]"]
    ),
    "three nodes round towards decode": (
        plan(nodes=3), ["0: prefill-0[0-7]", "1: decode-0[0-7]", "2: decode-1[0-7]"]
    ),
    "flags say how many of each": (
        plan(prefill=2, decode=1),
        ["0: prefill-0[0-7]", "1: prefill-1[0-7]", "2: decode-0[0-7]"],
    ),
    "one flag leaves the rest to the other role": (
        plan(nodes=3, decode=1),
        ["0: prefill-0[0-7]", "1: prefill-1[0-7]", "2: decode-0[0-7]"],
    ),
    "small weights give several replicas per node": (
        plan(nodes=2, facts=LLAMA_70B),
        ["0: prefill-0[0-3] prefill-1[4-7]", "1: decode-0[0-3] decode-1[4-7]"],
    ),
    "one node split in halves": (
        plan(model(prefill=RoleSpec(), decode=RoleSpec())),
        ["0: prefill-0[0-3] decode-0[4-7]"],
    ),
    "one node split by the lengths of the workload": (
        plan(model(prefill=RoleSpec(), workload=LONG), facts=LLAMA_8B),
        ["0: prefill-0[0] prefill-1[1] prefill-2[2] prefill-3[3] prefill-4[4] prefill-5[5] prefill-6[6] decode-0[7]"],
    ),
    "one node, sizes given": (
        plan(model(prefill=tp(2, replicas=3), decode=tp(2))),
        ["0: prefill-0[0-1] prefill-1[2-3] prefill-2[4-5] decode-0[6-7]"],
    ),
    "one node, one size given counts for both": (
        plan(model(prefill=tp(2), decode=RoleSpec())),
        ["0: prefill-0[0-1] prefill-1[2-3] decode-0[4-5] decode-1[6-7]"],
    ),
    "no GPUs, one engine per node": (
        plan(nodes=2, at=site(gpus=0)), ["0: prefill-0[0]", "1: decode-0[0]"]
    ),
    "no GPUs and one slot makes two nodes of a pair": (
        plan(model(prefill=RoleSpec()), site(gpus=0)), ["0: prefill-0[0]", "1: decode-0[0]"]
    ),
    "several engines per node without GPUs": (
        plan(model(prefill=RoleSpec(replicas=3), decode=RoleSpec(replicas=2)), site(gpus=0, engines=2), nodes=3),
        ["0: prefill-0[0] prefill-1[1]", "1: prefill-2[0]", "2: decode-0[0] decode-1[1]"],
    ),
    "replicas decide the nodes": (
        plan(model(prefill=tp(8, replicas=1), decode=tp(8, replicas=2))),
        ["0: prefill-0[0-7]", "1: decode-0[0-7]", "2: decode-1[0-7]"],
    ),
    "a replica over two nodes": (
        plan(model(aggregated=tp(8, pipeline_parallel=2)), nodes=2),
        ["0: aggregated-0/0[0-7]", "1: aggregated-0/1[0-7]"],
    ),
    "wide decode beside narrow prefill": (
        plan(model(prefill=tp(8), decode=tp(16)), nodes=3),
        ["0: prefill-0[0-7]", "1: decode-0/0[0-7]", "2: decode-0/1[0-7]"],
    ),
    "data-parallel ranks over nodes": (
        plan(model(aggregated=tp(4, data_parallel=4, expert_parallel=True)), facts=DEEPSEEK, nodes=2),
        ["0: aggregated-0/0[0-7]", "1: aggregated-0/1[0-7]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    planned, expected = LAYOUTS[name]
    assert layout(planned) == expected


@pytest.mark.parametrize(
    ("gpus", "nodes", "prefill", "decode"), [(8, 8, 4, 4), (4, 18, 9, 9), (8, 576, 288, 288), (1, 64, 32, 32)]
)
def test_whole_machines_are_filled(gpus: int, nodes: int, prefill: int, decode: int) -> None:
    planned = plan(at=site(gpus=gpus), nodes=nodes)
    assert (len(planned.with_role("prefill")), len(planned.with_role("decode"))) == (prefill, decode)
    used = [(rank, gpu) for replica in planned.replicas for rank in replica.nodes for gpu in replica.gpus]
    assert sorted(used) == [(rank, gpu) for rank in range(nodes) for gpu in range(gpus)]
    assert planned.gpus == nodes * gpus


def test_roles_never_share_a_node_when_there_are_several() -> None:
    for nodes in range(2, 40):
        planned = plan(nodes=nodes, facts=LLAMA_8B)
        roles = [{replica.role for replica in planned.on_node(rank)} for rank in range(nodes)]
        assert all(len(each) == 1 for each in roles)


@pytest.mark.parametrize(
    ("given", "written", "nodes", "expected"),
    [(4000, 500, 8, (5, 3)), (500, 2000, 8, (1, 7)), (100000, 10, 8, (7, 1)), (2000, 500, 8, (4, 4))],
)
def test_workload_steers_the_ratio(given: int, written: int, nodes: int, expected: tuple[int, int]) -> None:
    share = prefill_share(WorkloadSpec(input_tokens=given, output_tokens=written)).prefill
    assert split_nodes(nodes, share, 1, 1) == expected


def test_the_arithmetic_of_the_ratio_is_told() -> None:
    planned = plan(model(workload=WorkloadSpec(input_tokens=4000, output_tokens=500)), nodes=8)
    assert note(planned, "prefill.nodes").where == (
        "4000 input tokens at 4 per decoded token cost 1000, 500 output tokens 500: 67% of the GPUs prefill"
    )
    assert note(planned, "prefill.nodes").value == "5"


def test_splits_use_every_node_or_none_exists() -> None:
    for nodes in range(2, 30):
        for prefill in (1, 2, 3):
            for decode in (1, 2, 4):
                split = split_nodes(nodes, 0.5, prefill, decode)
                possible = any(
                    p % prefill == 0 and (nodes - p) % decode == 0 for p in range(prefill, nodes - decode + 1)
                )
                assert (split is not None) == possible
                if split is not None:
                    assert sum(split) == nodes and split[0] % prefill == 0 and split[1] % decode == 0


def test_slots_of_one_node_idle_as_little_as_possible() -> None:
    assert split_slots(8, 0.5, 3, 2) == (2, 1)
    assert split_slots(8, 0.9, 1, 1) == (7, 1)
    assert split_slots(2, 0.5, 2, 1) is None


@pytest.mark.parametrize(
    ("facts", "memory", "expected"),
    [
        (LLAMA_8B, 80, 1),
        (LLAMA_70B, 80, 4),
        (LLAMA_70B, 180, 2),
        (LLAMA_70B, 40, 8),
        (None, 80, 8),
        (LLAMA_70B, None, 8),
    ],
)
def test_tensor_parallel_follows_from_weights_and_memory(
    facts: object, memory: int | None, expected: int
) -> None:
    planned = plan(at=site(memory=memory), nodes=2, facts=facts)
    assert {replica.tensor_parallel for replica in planned.replicas} == {expected}
    assert note(planned, "decode.tensor_parallel").origin == "derived"


def test_tensor_parallel_divides_the_heads() -> None:
    odd = replace(LLAMA_8B, num_attention_heads=12, num_key_value_heads=4, weight_bytes=None)
    assert plan(facts=odd).replicas[0].tensor_parallel == 4


def test_shared_nodes_are_charged_for_the_gpus_in_use() -> None:
    planned = plan(model(aggregated=tp(2, replicas=2)), site(exclusive=False))
    assert (planned.slots_per_node, planned.gpus) == (4, 4)


def test_cost_is_gpus_times_walltime() -> None:
    assert plan(nodes=4, walltime=7200).gpu_hours == 64.0
    assert plan(at=site(gpus=0), nodes=4).gpu_hours == 0.0


def test_model_is_filled_in() -> None:
    planned = plan(nodes=4, walltime=3600)
    filled = planned.model
    assert (filled.nodes, filled.walltime, filled.device) == (4, 3600, "cuda")
    assert filled.prefill == RoleSpec(nodes=2, replicas=2, tensor_parallel=8)
    assert filled.decode == RoleSpec(nodes=2, replicas=2, tensor_parallel=8)
    assert filled.aggregated is None


def test_planning_a_plan_again_changes_nothing() -> None:
    first = plan(nodes=8, facts=LLAMA_70B)
    again = plan(first.model, first.site, facts=LLAMA_70B, name=first.name)
    assert replace(again, explanations=()) == replace(first, explanations=())


@pytest.mark.parametrize(
    ("path", "name"),
    [("org/Llama-3.3-70B", "llama-3.3-70b"), ("/models/a b/", "a-b"), ("/models/---", "hpcserve")],
)
def test_names_come_from_the_model(path: str, name: str) -> None:
    assert plan(model(model=path)).name == name


def test_ready_timeout_grows_with_the_weights_and_stays_inside_the_walltime() -> None:
    assert plan(nodes=2, facts=DEEPSEEK, at=site(memory=180), walltime=86400).ready_timeout == 4046
    assert plan(walltime=86400).ready_timeout == 1800
    assert plan(walltime=600).ready_timeout == 540


def note(planned: Plan, key: str) -> Explanation:
    (found,) = [note for note in planned.explanations if note.key == key]
    return found


def test_every_value_says_where_it_comes_from() -> None:
    spec = ModelSpec(model="/m", walltime=7200, served_name="x", decode=RoleSpec(nodes=3))
    here = site(partition="gpu", account="a")
    origins = {
        "walltime": "--set walltime",
        "served_name": "model.yaml:3",
        "decode.nodes": "model.yaml:5",
        "site.slurm.partition": "here.yaml:9",
    }
    planned = plan(spec, here, nodes=4, account="b", origins=origins)
    told = {note.key: (note.value, note.origin, note.where) for note in planned.explanations}
    assert told["walltime"] == ("02:00:00", "flag", "--set walltime")
    assert told["served_name"] == ("x", "model.yaml", "model.yaml:3")
    assert told["decode.nodes"] == ("3", "model.yaml", "model.yaml:5")
    assert told["partition"] == ("gpu", "site", "here.yaml:9")
    assert told["account"] == ("b", "flag", "--account")
    assert told["nodes"] == ("4", "flag", "--nodes")
    assert told["prefill.nodes"][1] == "derived"
    assert planned.site.slurm.account == "b"


def test_a_variable_is_told_as_environment() -> None:
    planned = plan(model(device="cpu"), site(gpus=0), origins={"device": "HPCSERVE_DEVICE"})
    assert note(planned, "device").origin == "environment"


def test_no_key_is_explained_twice() -> None:
    for planned, _ in LAYOUTS.values():
        keys = [note.key for note in planned.explanations]
        assert len(keys) == len(set(keys))


def test_slingshot_inside_one_node_is_fine() -> None:
    planned = plan(model(prefill=RoleSpec()), site(network="slingshot"))
    assert planned.disaggregated


def test_slingshot_without_a_wish_is_aggregated() -> None:
    planned = plan(at=site(network="slingshot"), nodes=2)
    assert not planned.disaggregated
    assert "Slingshot" in note(planned, "roles").where


def test_engines_per_node_are_a_limit_not_an_order() -> None:
    here = replace(site(gpus=0), node=NodeSite(gpus=0, cpu_engines=64))
    assert len(plan(at=here, nodes=2).replicas) == 2


def test_a_site_stages_models_that_are_paths_unless_model_yaml_says_no() -> None:
    here = replace(site(), storage=StorageSite(stage=True))
    assert plan(at=here).model.stage is True
    assert note(plan(at=here), "stage").origin == "site"
    assert plan(model(stage=False), here).model.stage is False
    hub = plan(model(model="org/name"), here)
    assert hub.model.stage is False
    assert note(hub, "stage").where == "`model` is not an absolute path"
    assert plan().model.stage is False


def test_workers_on_the_cpu_take_slots_as_they_take_gpus() -> None:
    spread = plan(model(device="cpu", prefill=tp(2, nodes=2), decode=RoleSpec(nodes=1)), site(gpus=0))
    assert layout(spread) == ["0: prefill-0/0[0]", "1: prefill-0/1[0]", "2: decode-0[0]"]
    told = {note.key: note.where for note in spread.explanations}
    assert (
        told["prefill.replicas"] == "one engine per 2 nodes on device cpu; `prefill.replicas` asks for more"
    )
    here = site(gpus=0, engines=4)
    ranks = plan(model(device="cpu", aggregated=tp(1, data_parallel=2, replicas=2)), here)
    assert layout(ranks) == ["0: aggregated-0[0-1] aggregated-1[2-3]"]
