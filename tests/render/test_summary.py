"""The plan as people see it before they submit."""

from __future__ import annotations

from dataclasses import replace

from hpcserve.config.model import RoleSpec
from hpcserve.render.summary import cost_line, layout_line, plan_table

from .cases import dgx, local, pair, plan


def test_plan_table() -> None:
    planned = plan(dgx(), model=pair(), nodes=3, walltime=4 * 3600)
    assert plan_table(planned) == (
        "model     /models/llama as llama\n"
        "engine    vllm on cuda\n"
        "site      dgx\n"
        "walltime  04:00:00\n"
        "cost      3 nodes × 8 GPUs × 04:00:00 = 96.0 GPU-hours at most\n"
        "\n"
        "NODES  ROLE     REPLICAS  EACH  GPUS\n"
        "0      prefill  1         TP8   8\n"
        "1-2    decode   2         TP8   16"
    )


def test_wide_replicas_say_how_many_nodes_they_take() -> None:
    model = replace(
        pair(), prefill=None, decode=None, aggregated=RoleSpec(tensor_parallel=8, pipeline_parallel=2)
    )
    planned = plan(dgx(), model=model, nodes=2)
    assert "0-1    aggregated  1         TP8 PP2 over 2 nodes  16" in plan_table(planned)
    assert layout_line(planned) == "2 nodes, 1 aggregated (TP8 PP2), vllm on cuda"


def test_cost_in_the_sites_own_units() -> None:
    planned = plan(replace(dgx(), gpu_hour_rate=1.5), nodes=1, walltime=3600)
    assert cost_line(planned) == "1 node × 8 GPUs × 01:00:00 = 8.0 GPU-hours at most, 12.0 units at 1.5 each"


def test_a_job_without_gpus_costs_none() -> None:
    assert cost_line(plan(local(), nodes=2)) == "2 nodes × 01:00:00, no GPUs"
