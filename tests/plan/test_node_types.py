"""Pools on other types of nodes than the site's `node`, alone or as one heterogeneous job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpcserve.config.model import RoleSpec
from hpcserve.config.records import from_json, to_json
from hpcserve.config.site import NodeType, Site
from hpcserve.errors import PlanError
from hpcserve.plan.plan import Component, Plan
from hpcserve.render.summary import cost_line, layout_line, plan_table

from .cases import LLAMA_8B, LLAMA_70B, layout, model, plan, site

L40S = NodeType(gpus=4, gpu_memory_gib=48, partition="gpu-l40s", gpu_type="l40s", max_nodes=6)
BARE = NodeType(gpus=0, partition="cpu")


def mixed(**slurm: Any) -> Site:
    """Eight GPUs of 80 GiB per node, and nodes of four smaller ones, and of none."""
    given = {"partition": "gpu", "gpu_type": "h100", "constraint": "ib", **slurm}
    return replace(site(**given), node_types={"l40s": L40S, "bare": BARE})


def on(**node_types: str | None) -> Any:
    return model(**{role: RoleSpec(node_type=kind) for role, kind in node_types.items()})


def why(planned: Plan, key: str) -> str:
    return next(note.where for note in planned.explanations if note.key == key)


def test_each_pool_is_sized_on_its_own_nodes() -> None:
    planned = plan(on(prefill="l40s", decode=None), mixed(), prefill=2, decode=1, facts=LLAMA_70B)
    assert layout(planned) == [
        "0: prefill-0[0-3]",  # 131 GiB want four GPUs of 48 GiB, but two of 80
        "1: prefill-1[0-3]",
        "2: decode-0[0-3] decode-1[4-7]",
    ]
    assert planned.components == (
        Component(node_type="l40s", nodes=2, slots_per_node=4),
        Component(node_type=None, nodes=1, slots_per_node=8),
    )
    assert planned.gpus == 16
    assert "A component of one node (decode) ends when any node of the job fails" in why(
        planned, "components"
    )
    assert from_json(Plan, to_json(planned)) == planned


def test_another_types_nvlink_domain_is_its_own() -> None:
    at = replace(mixed(), node=replace(mixed().node, nvlink_domain_nodes=18))
    assert at.with_nodes("l40s").node.nvlink_domain_nodes == 1
    racks = replace(at, node_types={"gb200": NodeType(gpus=4, nvlink_domain_nodes=36)})
    assert racks.with_nodes("gb200").node.nvlink_domain_nodes == 36


def test_a_fitting_size_is_found_for_each_type() -> None:
    planned = plan(on(prefill="l40s", decode=None), mixed(), facts=LLAMA_8B)
    assert layout(planned) == [
        "0: prefill-0[0] prefill-1[1] prefill-2[2] prefill-3[3]",
        "1: " + " ".join(f"decode-{gpu}[{gpu}]" for gpu in range(8)),
    ]


def test_one_type_for_all_pools_is_an_ordinary_job() -> None:
    planned = plan(on(prefill="l40s", decode="l40s"), mixed(), nodes=2)
    assert planned.components == () and planned.slots_per_node == 4
    slurm = planned.site.slurm
    # What describes the default nodes does not hold for these.
    assert (slurm.partition, slurm.gpu_type, slurm.constraint) == ("gpu-l40s", "l40s", None)
    assert why(planned, "partition") == "of the pools' node types"


def test_people_see_the_types() -> None:
    planned = plan(on(prefill="l40s", decode=None), mixed(), prefill=2, decode=1)
    assert cost_line(planned).startswith("(2 nodes × 4 GPUs + 1 node × 8 GPUs) × 01:00:00 = 16.0 GPU-hours")
    assert "2 prefill (TP4) on l40s + 1 decode (TP8) on default" in layout_line(planned)
    assert [line.split()[:3] for line in plan_table(planned).splitlines()[-2:]] == [
        ["0-1", "l40s", "prefill"],
        ["2", "default", "decode"],
    ]


REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "an unknown type": (
        on(prefill="a100", decode=None), {}, {"nodes": 2},
        "prefill.node_type is a100, but the node_types of site here are: l40s, bare",
    ),
    "no word on how many of which": (
        on(prefill="l40s", decode=None), {}, {"nodes": 4}, "how many of the 4 are of which is not said",
    ),
    "fewer nodes than pools": (
        on(prefill="l40s", decode=None), {}, {"nodes": 1}, "need a node each, but the job has 1",
    ),
    "more nodes than the type has": (
        on(prefill="l40s", decode=None), {}, {"prefill": 7, "decode": 1},
        "prefill on l40s asks for 7 nodes, but a job at site here may have at most 6",
    ),
    "a partition for both": (
        on(prefill="l40s", decode=None), {}, {"nodes": 2, "partition": "fast"},
        "--partition is fast, but prefill is on nodes of type l40s, which are in partition gpu-l40s",
    ),
    "segments": (
        on(prefill="l40s", decode=None), {"segment": True}, {"nodes": 2}, "segments would be of one",
    ),
    "going back into the queue": (
        on(prefill="l40s", decode=None), {"requeue": True}, {"nodes": 2}, "back into the queue one by one",
    ),
    "GPUs nobody asks for": (
        on(prefill="l40s", decode=None), {"gpu_request": "none"}, {"nodes": 2}, "asks for no GPUs",
    ),
    "GPUs for one pool": (
        on(prefill="bare", decode=None), {}, {"nodes": 2},
        "the other pool's nodes have GPUs, but the nodes of type bare of site here have no GPU",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_work_is_refused(name: str) -> None:
    spec, slurm, flags, message = REFUSED[name]
    with pytest.raises(PlanError) as caught:
        plan(spec, mixed(**slurm), **flags)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_machine_without_slurm_has_one_type() -> None:
    with pytest.raises(PlanError, match="scheduler: local has one type of nodes"):
        plan(on(prefill="l40s", decode=None), replace(mixed(), scheduler="local"), nodes=2)


def test_engines_without_gpus_may_be_on_any_nodes() -> None:
    spec = replace(on(prefill="bare", decode=None), device="cpu")
    assert layout(plan(spec, mixed())) == ["0: prefill-0[0]", "1: decode-0[0]"]
