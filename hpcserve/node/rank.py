"""Which rank this process is, and which start of the job it belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RendezvousError
from ..slurm.nodelist import expand

RANK_VARIABLES = ("HPCSERVE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")


def rank_of(environ: Mapping[str, str]) -> int:
    """The rank the launcher gave this process. Raises RendezvousError when there is none."""
    for variable in RANK_VARIABLES:
        value = environ.get(variable)
        if value:
            if not value.isdecimal():
                raise RendezvousError(
                    f"{variable}={value!r} is not a rank: 0, 1, 2, … is expected",
                    hint="start this program with srun, or set HPCSERVE_RANK",
                )
            return int(value)
    raise RendezvousError(
        f"this process has no rank: none of {', '.join(RANK_VARIABLES)} is set",
        hint="start this program with srun or mpirun, or set HPCSERVE_RANK",
    )


def attempt_of(environ: Mapping[str, str]) -> str:
    """Names one start of the job. A requeued job has the same run directory and another attempt.

    Files of an earlier start are told apart by it.
    """
    job = environ.get("SLURM_JOB_ID", "local")
    return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}"


def node_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Slurm's names of the step's nodes in rank order; empty outside Slurm.

    In a heterogeneous job ranks follow the components, and the step's own list is sorted over all of them.
    """
    size = environ.get("SLURM_HET_SIZE", "")
    if size.isdecimal():
        lists = [environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{number}", "") for number in range(int(size))]
        return tuple(name for part in lists for name in expand(part))
    text = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    return expand(text)
