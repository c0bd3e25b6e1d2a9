"""How Slurm is asked for GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..plan.plan import Plan


def gpu_request(plan: Plan) -> Iterator[str]:
    """The flag of sbatch and srun for all GPUs of a node that the job uses; none where it asks for none."""
    slurm = plan.site.slurm
    if plan.device == "cpu" or slurm.gpu_request == "none":
        return
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if slurm.gpu_request == "gres":
        yield f"--gres=gpu:{kind}{plan.slots_per_node}"
    else:
        yield f"--gpus-per-node={kind}{plan.slots_per_node}"
