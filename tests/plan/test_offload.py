"""Sizes of the KV tiers."""

from __future__ import annotations

import pytest

from hpcserve.config.model import KvOffloadSpec
from hpcserve.config.site import NodeSite, StorageSite
from hpcserve.errors import PlanError
from hpcserve.plan.offload import cpu_bytes, disk_bytes, kv_writers, shared_bytes

from .cases import GIB, model, plan, replace, site, tp

KV = KvOffloadSpec(cpu_gib=100, disk_gib=1000)
WIDE = "but a rank of aggregated-0 spans 2 nodes, and vLLM writes the first one's part alone"
SHARED = replace(site(), storage=StorageSite(kv="/lustre/me/kv"))


def test_a_nodes_memory_and_disk_are_divided_among_its_replicas() -> None:
    planned = plan(model(prefill=tp(8), decode=tp(2), kv_offload=KV), site(), nodes=2)
    prefill, *decode = planned.replicas
    assert len(decode) == 4
    assert (cpu_bytes(planned, prefill), disk_bytes(planned, prefill)) == (100 * GIB, 1000 * GIB)
    assert {(cpu_bytes(planned, each), disk_bytes(planned, each)) for each in decode} == {
        (25 * GIB, 250 * GIB)
    }


def test_ranks_share_a_node_and_one_over_two_nodes_has_its_part_on_each() -> None:
    wide = plan(model(aggregated=tp(16), kv_offload=KvOffloadSpec(cpu_gib=100)), site(), nodes=2)
    assert cpu_bytes(wide, wide.replicas[0]) == 100 * GIB
    ranks = plan(model(aggregated=tp(1, data_parallel=16), kv_offload=KV), site(), nodes=2)
    assert cpu_bytes(ranks, ranks.replicas[0]) == 100 * GIB // 8
    assert disk_bytes(ranks, ranks.replicas[0]) == 1000 * GIB


def test_memory_by_default_is_a_part_of_the_nodes() -> None:
    here = replace(site(), node=NodeSite(gpus=8, gpu_memory_gib=80, memory_gib=2000))
    planned = plan(model(kv_offload=KvOffloadSpec()), here)
    (note,) = [each for each in planned.explanations if each.key == "kv_offload.cpu_gib"]
    assert (note.value, note.origin, note.where) == ("800", "derived", "40% of the node's 2000 GiB")
    assert cpu_bytes(planned, planned.replicas[0]) * len(planned.replicas) == 800 * GIB
    assert disk_bytes(planned, planned.replicas[0]) == 0


def test_the_shared_directory_is_one_for_all_ranks_of_all_replicas() -> None:
    spec = KvOffloadSpec(cpu_gib=100, shared_gib=500, answers=True)
    planned = plan(model(prefill=tp(8), decode=tp(1, data_parallel=8), kv_offload=spec), SHARED, nodes=3)
    assert shared_bytes(planned) == 500 * GIB
    assert kv_writers(planned) == sum(each.data_parallel for each in planned.replicas) == 17
    notes = {each.key: each.value for each in planned.explanations}
    assert (notes["kv_offload.shared_gib"], notes["storage.kv"]) == ("500", "/lustre/me/kv")
    assert notes["kv_offload.answers"] == "true"
    assert shared_bytes(plan()) == 0


def test_without_the_key_there_is_none() -> None:
    planned = plan()
    assert cpu_bytes(planned, planned.replicas[0]) == disk_bytes(planned, planned.replicas[0]) == 0


@pytest.mark.parametrize(
    ("spec", "at", "message"),
    [
        (
            model(kv_offload=KvOffloadSpec()), site(),
            "kv_offload.cpu_gib is not set, and site here does not say how much memory its nodes have",
        ),
        (
            model(kv_offload=KV, engine="sglang"), site(),
            "kv_offload is set, but hpcserve has no KV tiers for SGLang",
        ),
        (
            model(kv_offload=KV), replace(site(), node=NodeSite(gpus=8, memory_gib=120)),
            "kv_offload.cpu_gib is 100, but a node has 120 GiB of memory",
        ),
        (
            model(kv_offload=replace(KV, shared_gib=500)), site(),
            "kv_offload.shared_gib is set, but site here does not say where",
        ),
        (
            model(aggregated=tp(16), kv_offload=KV), site(),
            f"kv_offload.disk_gib is set, {WIDE}",
        ),
        (
            model(aggregated=tp(16), kv_offload=KvOffloadSpec(cpu_gib=1, shared_gib=500)), SHARED,
            f"kv_offload.shared_gib is set, {WIDE}",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(spec, at, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError) as refused:
        plan(spec, at)
    assert refused.value.message == message
    assert refused.value.hint
