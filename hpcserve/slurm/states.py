"""Slurm's job states and pending reasons in plain words.

States: `man squeue`, JOB STATE CODES, Slurm 20.11 to 25.11. Reasons: `man squeue`, JOB REASON
CODES. Both maps are total: a word that is not in them gets an answer that shows the word itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["queued", "starting", "running", "ending", "done", "failed", "gone"]
"""`gone`: no process is left and nobody knows how it ended."""

STATES: dict[str, tuple[Phase, str]] = {
    "PENDING": ("queued", "waiting in the queue"),
    "REQUEUED": ("queued", "back in the queue"),
    "REQUEUE_FED": ("queued", "back in the queue of another cluster"),
    "REQUEUE_HOLD": ("queued", "back in the queue, and held there"),
    "RESV_DEL_HOLD": ("queued", "held: its reservation was deleted"),
    "SPECIAL_EXIT": ("queued", "back in the queue, held after a special exit status"),
    "EXPEDITING": ("queued", "back in the queue, first in line"),
    "CONFIGURING": ("starting", "the nodes are being prepared"),
    "POWER_UP_NODE": ("starting", "the nodes are being powered up"),
    "RUNNING": ("running", "running"),
    "RESIZING": ("running", "changing its size"),
    "SIGNALING": ("running", "being signalled"),
    "SUSPENDED": ("running", "suspended: its nodes were lent to another job"),
    "STOPPED": ("running", "stopped by SIGSTOP"),
    "UPDATE_DB": ("running", "running"),
    "COMPLETING": ("ending", "ending: some nodes still clean up"),
    "STAGE_OUT": ("ending", "ending: files are being staged out"),
    "COMPLETED": ("done", "ended by itself"),
    "BOOT_FAIL": ("failed", "the nodes did not boot"),
    "CANCELLED": ("failed", "cancelled by its owner or an administrator"),
    "DEADLINE": ("failed", "ended at its deadline"),
    "FAILED": ("failed", "ended with an error"),
    "LAUNCH_FAILED": ("failed", "Slurm could not start it on a node"),
    "NODE_FAIL": ("failed", "ended because a node failed"),
    "OUT_OF_MEMORY": ("failed", "killed: out of memory"),
    "PREEMPTED": ("failed", "ended to make room for a job with a higher priority"),
    "RECONFIG_FAIL": ("failed", "a node could not be reconfigured for it"),
    "REVOKED": ("failed", "taken over by another cluster"),
    "TIMEOUT": ("failed", "ended at the end of its walltime"),
    "GONE": ("gone", "ended; the scheduler does not remember how"),
}


def phase_of(state: str) -> Phase:
    """An unknown state counts as running: the mistake that cancels nothing and loses nothing."""
    return STATES.get(state, ("running", ""))[0]


def words_for(state: str) -> str:
    return STATES[state][1] if state in STATES else f"in the state Slurm calls {state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Why a job waits."""

    words: str
    remedy: str | None = None
    never: bool = False
    """It will not start by itself: somebody has to change something."""


_CHANGE = "stop this run and launch again with"

_REASONS: dict[str, Pending] = {
    "None": Pending(words="Slurm has not looked at it yet"),
    "Priority": Pending(words="jobs with a higher priority come first"),
    "Resources": Pending(words="it is next: waiting for enough nodes to become free"),
    "BeginTime": Pending(words="its earliest start time is not reached"),
    "Cleaning": Pending(words="its nodes are cleaning up after the last job"),
    "Prolog": Pending(words="the site's prolog runs on its nodes"),
    "Licenses": Pending(words="waiting for a licence"),
    "Reservation": Pending(words="waiting for its reservation to begin"),
    "Dependency": Pending(words="waiting for the job it depends on"),
    "DependencyNeverSatisfied": Pending(
        words="the job it depends on failed", remedy=f"{_CHANGE}out that dependency", never=True
    ),
    "JobHeldUser": Pending(words="you hold it", remedy="release it: `scontrol release JOB`", never=True),
    "JobHeldAdmin": Pending(
        words="an administrator holds it", remedy="ask the site's support why", never=True
    ),
    "ReqNodeNotAvail": Pending(words="nodes it needs are down, drained or reserved (maintenance?)"),
    "NodeDown": Pending(words="a node it needs is down"),
    "PartitionDown": Pending(
        words="the partition starts no jobs at the moment", remedy="ask the site, or try --partition"
    ),
    "PartitionInactive": Pending(
        words="the partition is inactive", remedy=f"{_CHANGE} another --partition", never=True
    ),
    "PartitionNodeLimit": Pending(
        words="it asks for more nodes than the partition allows",
        remedy=f"{_CHANGE} fewer --nodes or another --partition",
        never=True,
    ),
    "PartitionTimeLimit": Pending(
        words="its walltime is longer than the partition allows",
        remedy=f"{_CHANGE} a shorter --walltime or another --partition",
        never=True,
    ),
    "PartitionConfig": Pending(
        words="the partition can't give what it asks for",
        remedy=f"{_CHANGE} fewer --nodes, or another --partition",
        never=True,
    ),
    "BadConstraints": Pending(
        words="no node has what it asks for",
        remedy="compare `slurm.constraint` and the GPU request of the site with `sinfo -o '%P %f %G'`",
        never=True,
    ),
    "InvalidAccount": Pending(
        words="its account is not valid", remedy=f"{_CHANGE} another --account", never=True
    ),
    "AccountNotAllowed": Pending(
        words="its account may not use this partition",
        remedy=f"{_CHANGE} another --account or --partition",
        never=True,
    ),
    "InvalidQOS": Pending(words="its QOS is not valid", remedy="change `slurm.qos` of the site", never=True),
    "QOSNotAllowed": Pending(
        words="its QOS may not use this partition", remedy="change `slurm.qos` of the site", never=True
    ),
    "QOSJobLimit": Pending(words="its QOS runs as many jobs as it may"),
    "QOSTimeLimit": Pending(
        words="its walltime is longer than its QOS allows",
        remedy=f"{_CHANGE} a shorter --walltime",
        never=True,
    ),
    "MaxMemPerLimit": Pending(
        words="it asks for more memory per node than allowed",
        remedy="lower `slurm.memory` of the site",
        never=True,
    ),
    "JobHoldMaxRequeue": Pending(
        words="it failed and was put back too often", remedy="see `hpcserve logs`", never=True
    ),
    "launch_failed_requeued_held": Pending(
        words="Slurm could not start it on a node and holds it now",
        remedy="release it (`scontrol release JOB`), or tell the site's support",
        never=True,
    ),
}

# Families of limits, as (beginning, end of the name, answer); the first that fits is used.
_FAMILIES: tuple[tuple[str, str, Pending], ...] = (
    ("AssocGrp", "RunMinutesLimit", Pending(words="running jobs hold all the time the account has left")),
    (
        "AssocGrp",
        "MinutesLimit",
        Pending(
            words="the account has used up its GPU or CPU time",
            remedy=f"{_CHANGE} another --account, or a shorter --walltime",
        ),
    ),
    (
        "QOSMax",
        "PerJobLimit",
        Pending(
            words="it asks for more than its QOS gives one job",
            remedy=f"{_CHANGE} fewer --nodes or a shorter --walltime",
            never=True,
        ),
    ),
    (
        "AssocMax",
        "PerJobLimit",
        Pending(
            words="it asks for more than its account gives one job",
            remedy=f"{_CHANGE} fewer --nodes or a shorter --walltime",
            never=True,
        ),
    ),
    (
        "QOSMaxWall",
        "",
        Pending(
            words="its walltime is longer than its QOS allows",
            remedy=f"{_CHANGE} a shorter --walltime",
            never=True,
        ),
    ),
    (
        "AssocMaxWall",
        "",
        Pending(
            words="its walltime is longer than its account allows",
            remedy=f"{_CHANGE} a shorter --walltime",
            never=True,
        ),
    ),
    ("QOS", "Limit", Pending(words="you or your group use all that this QOS gives at a time")),
    ("QOS", "", Pending(words="you or your group use all that this QOS gives at a time")),
    ("Assoc", "", Pending(words="you or your account use all that is allowed at a time")),
    ("Nodes required for job", "", _REASONS["ReqNodeNotAvail"]),
    ("ReqNodeNotAvail", "", _REASONS["ReqNodeNotAvail"]),
)


def explain_pending(reason: str) -> Pending:
    """What a reason printed by `squeue --format=%r` means."""
    plain = reason.strip().strip("()")
    if not plain:
        return _REASONS["None"]
    known = _REASONS.get(plain) or _REASONS.get(plain.replace(" ", "_"))
    if known:
        return known
    for beginning, end, answer in _FAMILIES:
        if plain.startswith(beginning) and plain.endswith(end):
            return answer
    return Pending(words=f"Slurm's reason is {plain}")
