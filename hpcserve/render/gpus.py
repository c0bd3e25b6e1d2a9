"""How Slurm is asked for GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..config.site import SlurmSite


def gpu_request(device: str, slurm: SlurmSite, gpus: int) -> Iterator[str]:
    """The flag of sbatch and srun for all `gpus` of a node that the job uses; none where it asks for none."""
    if device == "cpu" or slurm.gpu_request == "none":
        return
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if slurm.gpu_request == "gres":
        yield f"--gres=gpu:{kind}{gpus}"
    else:
        yield f"--gpus-per-node={kind}{gpus}"
