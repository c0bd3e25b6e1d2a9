"""Sites, models and plans that several tests of plans and scripts share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcserve.config.model import ModelSpec, RoleSpec, WorkloadSpec
from hpcserve.config.site import ContainerSite, NodeSite, NodeType, Site, SlurmSite
from hpcserve.config.sites import find_site
from hpcserve.plan.plan import Plan
from hpcserve.plan.planner import make_plan
from hpcserve.plan.request import PlanRequest

RUN_DIR = Path("/scratch/alice/hpcserve/llama")
PYTHON = "/opt/hpcserve/bin/python"
IMAGES = {"none": None, "pyxis": "/images/hpcserve.sqsh", "apptainer": "/images/hpcserve.sif"}
SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "site-configs").glob("*.yaml"))


def shipped(name: str) -> Site:
    """A shipped site, with an account where it asks for one."""
    site = find_site(name, environ={k: os.environ[k] for k in ("PATH",)}, hostname="nowhere").value
    return replace(site, slurm=replace(site.slurm, account=site.slurm.account or "proj"))


def contained(site: Site, runtime: str) -> Site:
    """`site` with another container runtime."""
    container = replace(site.container, runtime=runtime, image=site.container.image or IMAGES[runtime])
    return replace(site, container=container)


def dgx(**slurm: Any) -> Site:
    """Eight GPUs of 80 GiB per node."""
    return Site(name="dgx", slurm=SlurmSite(**slurm), node=NodeSite(gpus=8, gpu_memory_gib=80))


def local(engines: int = 1) -> Site:
    return Site(name="local", scheduler="local", node=NodeSite(gpus=0, cpu_engines=engines))


def plan(site: Site, *, model: ModelSpec | None = None, **flags: Any) -> Plan:
    return make_plan(PlanRequest(model=model or ModelSpec(model="/models/llama"), site=site, **flags))


def pair(**values: Any) -> ModelSpec:
    """A model served by prefill and decode."""
    return ModelSpec(model="/models/llama", prefill=RoleSpec(), decode=RoleSpec(), **values)


def aggregated(**values: Any) -> ModelSpec:
    return ModelSpec(model="/models/llama", aggregated=RoleSpec(), **values)


def mixed(runtime: str = "none") -> Plan:
    """Prefill on four L40S a node, decode on eight H100: a heterogeneous job."""
    l40s = NodeType(gpus=4, gpu_memory_gib=48, partition="gpu-l40s", gpu_type="l40s")
    site = replace(shipped("dgx-h100"), name="dgx-h100-l40s", node_types={"l40s": l40s})
    site = replace(site, slurm=replace(site.slurm, partition="gpu-h100", gpu_type="h100"))
    model = pair(workload=WorkloadSpec(input_tokens=6000, output_tokens=500))
    model = replace(model, prefill=RoleSpec(node_type="l40s", nodes=4), decode=RoleSpec(nodes=2))
    return plan(contained(site, runtime) if runtime != "none" else site, model=model)


__all__ = ["PYTHON", "RUN_DIR", "SHIPPED", "ContainerSite", "aggregated", "contained", "dgx", "local",
           "mixed", "pair", "plan", "shipped"]  # fmt: skip
