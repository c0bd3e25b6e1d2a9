from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.slurm.states import STATES, explain_pending, phase_of, words_for

# `man squeue` of 22.05 and 25.05, JOB STATE CODES.
MANUAL = [
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "CONFIGURING",
    "COMPLETING",
    "DEADLINE",
    "EXPEDITING",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PENDING",
    "PREEMPTED",
    "POWER_UP_NODE",
    "RECONFIG_FAIL",
    "RUNNING",
    "RESV_DEL_HOLD",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "REQUEUED",
    "RESIZING",
    "REVOKED",
    "SIGNALING",
    "SPECIAL_EXIT",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
    "TIMEOUT",
    "UPDATE_DB",
]


@pytest.mark.parametrize("state", MANUAL)
def test_every_state_of_the_manual_is_known(state: str) -> None:
    assert state in STATES


@given(st.text(max_size=30))
def test_any_other_state_counts_as_alive_and_shows_its_own_name(state: str) -> None:
    if state not in STATES:
        assert phase_of(state) == "running"
        assert state in words_for(state)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "higher priority"),
        ("Resources", "it is next"),
        ("(Resources)", "it is next"),
        ("QOSMaxJobsPerUserLimit", "all that this QOS gives"),
        ("QOSGrpGRES", "all that this QOS gives"),
        ("AssocGrpNodeLimit", "all that is allowed"),
        ("AssocGrpCPUMinutesLimit", "used up"),
        ("AssocGrpCPURunMinutesLimit", "hold all the time the account has left"),
        ("ReqNodeNotAvail, Reserved for maintenance", "maintenance"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "maintenance",
        ),
        ("launch failed requeued held", "could not start it"),
        ("BrandNewReason", "Slurm's reason is BrandNewReason"),
    ],
)
def test_a_pending_reason_has_plain_words(reason: str, words: str) -> None:
    assert words in explain_pending(reason).words


@pytest.mark.parametrize("reason", ["Priority", "Resources", "QOSMaxJobsPerUserLimit", "BeginTime", ""])
def test_waiting_that_ends_by_itself_is_not_called_hopeless(reason: str) -> None:
    assert not explain_pending(reason).never


@pytest.mark.parametrize(
    ("reason", "flag"),
    [
        ("PartitionTimeLimit", "--walltime"),
        ("PartitionNodeLimit", "--nodes"),
        ("QOSMaxWallDurationPerJobLimit", "--walltime"),
        ("QOSMaxNodePerJobLimit", "--nodes"),
        ("InvalidAccount", "--account"),
        ("BadConstraints", "sinfo"),
        ("JobHeldUser", "scontrol release"),
    ],
)
def test_a_job_that_never_starts_says_so_and_what_to_change(reason: str, flag: str) -> None:
    pending = explain_pending(reason)
    assert pending.never
    assert flag in (pending.remedy or "")


@given(st.text(max_size=40))
def test_every_reason_gets_an_answer(reason: str) -> None:
    assert explain_pending(reason).words
