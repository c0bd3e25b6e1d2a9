"""A job's nodes as Slurm has them now, and whether it still has the one its script runs on.

With `--no-kill` Slurm takes a failed node out of the job and lets the rest go on, also where that was the
node with the batch script (seen with Slurm 22.05; `kill_running_job_by_node_name` in its `job_mgr.c`). Such a
job is an orphan: nobody ends it before its walltime, its other nodes stay allocated, and jobs that come after
it never begin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .nodelist import expand
from .states import phase_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One job, of those that have begun."""

    state: str
    batch_host: str
    """The node of the batch script; empty where Slurm does not say."""
    nodes: tuple[str, ...]
    requeues: bool
    """Slurm may start it again."""

    @property
    def runs(self) -> bool:
        return phase_of(self.state) == "running"

    @property
    def orphaned(self) -> bool:
        return self.runs and bool(self.nodes) and bool(self.batch_host) and self.batch_host not in self.nodes


def read_allocation(shown: str) -> Allocation | None:
    """What `scontrol show job --oneliner ID` prints; None for something else."""
    # `ReqNodeList=` and `ExcNodeList=` are others.
    found = dict(re.findall(r"(?:^|\s)(JobState|BatchHost|NodeList|Requeue)=(\S*)", shown))
    nodes = found.get("NodeList", "")
    if "JobState" not in found:
        return None
    try:
        names = () if nodes.startswith("(") else expand(nodes)
    except ValueError:
        return None
    return Allocation(
        state=found["JobState"],
        batch_host=found.get("BatchHost", ""),
        nodes=names,
        requeues=found.get("Requeue") == "1",
    )
