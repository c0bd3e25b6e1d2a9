"""Short ways to write plan requests in tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.config.model_facts import ModelFacts
from hpcserve.config.site import ContainerSite, NetworkSite, NodeSite, Site, SlurmSite
from hpcserve.plan.plan import Plan
from hpcserve.plan.planner import make_plan
from hpcserve.plan.request import PlanRequest

GIB = 1 << 30
LLAMA_70B = ModelFacts(
    path="/m", num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80, weight_bytes=131 * GIB
)
LLAMA_8B = ModelFacts(
    path="/m", num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32, weight_bytes=15 * GIB
)
DEEPSEEK = ModelFacts(
    path="/m",
    num_attention_heads=128,
    num_key_value_heads=128,
    num_hidden_layers=61,
    num_experts=256,
    weight_bytes=642 * GIB,
)


def site(
    gpus: int = 8, memory: int | None = 80, *, engines: int = 1, network: str = "infiniband", **slurm: Any
) -> Site:
    return Site(
        name="here",
        slurm=SlurmSite(**slurm),
        node=NodeSite(gpus=gpus, gpu_memory_gib=memory, cpu_engines=engines),
        network=NetworkSite(kind=network),  # type: ignore[arg-type]
    )


def contained(runtime: str) -> Site:
    return replace(site(), container=ContainerSite(runtime=runtime))  # type: ignore[arg-type]


def model(**keys: Any) -> ModelSpec:
    return ModelSpec(model=keys.pop("model", "/models/llama"), **keys)


def plan(spec: ModelSpec | None = None, at: Site | None = None, **flags: Any) -> Plan:
    return make_plan(PlanRequest(model=spec or model(), site=at or site(), **flags))


def layout(planned: Plan) -> list[str]:
    """One line per node: `0: prefill-0[0-3] prefill-1[4-7]`."""
    lines = []
    for rank in range(planned.nodes):
        parts = []
        for replica in planned.on_node(rank):
            first, last = replica.gpus[0], replica.gpus[-1]
            span = f"{first}-{last}" if last > first else f"{first}"
            place = f"/{replica.nodes.index(rank)}" if len(replica.nodes) > 1 else ""
            parts.append(f"{replica.name}{place}[{span}]")
        lines.append(f"{rank}: {' '.join(parts)}")
    return lines


def tp(size: int, **more: Any) -> RoleSpec:
    return RoleSpec(tensor_parallel=size, **more)
