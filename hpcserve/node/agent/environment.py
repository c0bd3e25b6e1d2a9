"""The environment an engine starts with: the agent's, without what MPI and the job step left in it.

An engine that finds another launcher's variables joins that launcher's world: torch takes RANK for
its own, MPI inside a library collides with the step's PMIx name space, srun inherits task counts.
UCX_*, NCCL_* and CUDA_VISIBLE_DEVICES are the user's and the site's settings and stay.
"""

from __future__ import annotations

from collections.abc import Mapping

SCRUBBED_PREFIXES = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PMI2_",
    "MPI_",
    "I_MPI_",
    "HYDRA_",
    "HYDI_",
    "MPICH_",
    "MPIEXEC_",
    "MV2_",
    "CRAY_PMI",
    "ORTE_",
    "PRTE_",
    "PALS_",
    "SLURM_STEP",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_PMI",
    "SLURM_CPU_BIND",
    "SLURM_SRUN",
    "SLURM_TASK",
    "SLURM_GTIDS",
    "SRUN_",
)
SCRUBBED_NAMES = frozenset(
    {
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_MPI_TYPE",
        "SLURM_DISTRIBUTION",
        "SLURM_UMASK",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "HPCSERVE_RANK",
        "HPCSERVE_RUN_DIR",
    }
)


def scrub(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables of MPI, PMI and the job step."""
    return {
        name: value
        for name, value in environ.items()
        if name not in SCRUBBED_NAMES and not name.startswith(SCRUBBED_PREFIXES)
    }


_OF_THE_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTERS", "SLURM_NETWORK")


def step_environment(environ: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """What srun gets for a step beside the agents' step: it takes variables for flags that nobody gave, such
    as the agents' task count, memory or GPUs, so only what names the job and the cluster is left."""
    kept = {
        name: value
        for name, value in scrub(environ).items()
        if not name.startswith("SLURM_") or name.startswith(_OF_THE_JOB)
    }
    return {**kept, **added}


def engine_environment(
    environ: Mapping[str, str], added: Mapping[str, str], *, key_variable: str, key: str, scratch: str
) -> dict[str, str]:
    """What the engine process gets. `added` wins; only the key is above it."""
    # Sockets and caches of engines go below TMPDIR; /tmp itself belongs to everybody on the node.
    return {**scrub(environ), "TMPDIR": scratch, **added, key_variable: key}
