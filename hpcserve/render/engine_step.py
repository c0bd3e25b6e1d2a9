"""The Slurm step of a replica over several nodes that is one MPI program. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..plan.plan import Plan, ReplicaPlan
from .gpus import gpu_request

_LAST_RANK = 30
"""Seconds from the end of a replica's first rank to that of its last. Without it srun waits for ever, where
the site's WaitTime is not set."""


def srun_words(plan: Plan, replica: ReplicaPlan, nodes: str) -> Iterator[str]:
    """`srun` and its flags: one task for each GPU, and the ranks of a node one after the other.

    `nodes` is Slurm's list of the replica's nodes. Every flag has its value in the same word, for Slurm's own
    tools take `--cpu-bind none` in two ways.
    """
    each = len(replica.gpus)
    yield from ("srun", f"--job-name={replica.name}", f"--mpi={plan.site.slurm.mpi}")
    # The agents' step holds the same CPUs, memory and GPUs.
    yield "--overlap"
    yield from (f"--nodes={len(replica.nodes)}", f"--nodelist={nodes}")
    yield from (f"--ntasks={each * len(replica.nodes)}", f"--ntasks-per-node={each}")
    yield from ("--distribution=block", "--cpu-bind=none")
    yield from gpu_request(plan.device, plan.site.slurm, plan.slots_per_node)
    # Ranks of one replica live and die together, also those of a replica that ends without an error.
    yield from ("--kill-on-bad-exit=1", f"--wait={_LAST_RANK}")
    yield from ("--input=none", "--export=ALL", "--chdir=/")
