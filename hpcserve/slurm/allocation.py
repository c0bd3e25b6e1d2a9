"""A job's nodes as Slurm has them now, and whether it still has the one its script runs on.

With `--no-kill` Slurm takes a failed node out of the job and lets the rest go on, also where that was the
node with the batch script (seen with Slurm 22.05; `kill_running_job_by_node_name` in its `job_mgr.c`). Such a
job is an orphan: nobody ends it before its walltime, its other nodes stay allocated, and jobs that come after
it never begin.

A heterogeneous job has one record for each component. Slurm takes the death of a node for one in all of
them, so a component of one node ends with any node of the job; one of more goes on, even when the first one,
which has the batch script, is over. That is an orphan as well.
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
    others: tuple[str, ...] = ()
    """States of the other components of a heterogeneous job; the fields above are the first one's."""

    @property
    def runs(self) -> bool:
        return any(phase_of(state) == "running" for state in (self.state, *self.others))

    @property
    def orphaned(self) -> bool:
        if not self.runs or not self.nodes or not self.batch_host:
            return False
        headless = phase_of(self.state) in ("done", "failed")
        return headless or (phase_of(self.state) == "running" and self.batch_host not in self.nodes)


def read_allocation(shown: str) -> Allocation | None:
    """What `scontrol show job --oneliner ID` prints; None for something else."""
    # `ReqNodeList=` and `ExcNodeList=` are others.
    fields = r"(?:^|\s)(JobState|HetJobOffset|BatchHost|NodeList|Requeue)=(\S*)"
    records = [
        record for line in shown.splitlines() if "JobState" in (record := dict(re.findall(fields, line)))
    ]
    if not records:
        return None
    found, *others = sorted(records, key=lambda record: int(record.get("HetJobOffset") or 0))
    nodes = found.get("NodeList", "")
    try:
        names = () if nodes.startswith("(") else expand(nodes)
    except ValueError:
        return None
    return Allocation(
        state=found["JobState"],
        batch_host=found.get("BatchHost", ""),
        nodes=names,
        requeues=found.get("Requeue") == "1",
        others=tuple(record["JobState"] for record in others),
    )
