from __future__ import annotations

import pytest

from hpcserve.errors import SlurmDown, SlurmError
from hpcserve.slurm.allocation import read_allocation
from hpcserve.slurm.sbatch import SlurmScheduler

from .fake_slurm import FakeSlurm
from .test_sbatch import fake as fake  # the fixture

# `scontrol show job --oneliner` of Slurm 22.05, a job of two nodes whose first one failed.
ORPHAN = (
    "JobId=29 JobName=fake UserId=hsuser(1001) GroupId=hsuser(1001) MCS_label=N/A Priority=4294901731 Nice=0"
    " Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=0 Restarts=0"
    " BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:21:34 TimeLimit=01:00:00 TimeMin=N/A Partition=main"
    " AllocNode:Sid=localhost:22257 ReqNodeList=(null) ExcNodeList=(null) NodeList=n2 BatchHost=n1 NumNodes=1"
    " NumCPUs=8 NumTasks=2 Command=/home/hsuser/.hpcserve/runs/fake-5dvf/job.sh TresPerNode=gres:gpu:4"
)


def test_a_job_without_the_node_of_its_script_is_an_orphan() -> None:
    found = read_allocation(ORPHAN)
    assert found is not None and found.orphaned and found.nodes == ("n2",) and not found.requeues


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("NodeList=n2 BatchHost=n1", "NodeList=n[1-2] BatchHost=n1"),
        ("BatchHost=n1 ", ""),
        ("NodeList=n2", "NodeList=(null)"),
        ("JobState=RUNNING", "JobState=COMPLETING"),
        ("JobState=RUNNING", "JobState=CANCELLED"),
        ("JobState=RUNNING", "JobState=PENDING"),
    ],
)
def test_what_is_no_orphan(part: str, instead: str) -> None:
    assert part in ORPHAN
    found = read_allocation(ORPHAN.replace(part, instead))
    assert found is not None and not found.orphaned


# Of Slurm 22.05: the head node n3 died, and with it the first component.
HEADLESS = (
    "JobId=3 HetJobId=3 HetJobOffset=0 JobName=het HetJobIdSet=3-4 JobState=NODE_FAIL Requeue=0"
    " ReqNodeList=(null) ExcNodeList=(null) NodeList=n3 BatchHost=n3 NumNodes=1\n"
    "JobId=4 HetJobId=3 HetJobOffset=1 JobName=het HetJobIdSet=3-4 JobState=RUNNING Reason=None Requeue=0"
    " ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2\n"
)


def test_a_component_that_outlives_the_job_script_is_an_orphan() -> None:
    found = read_allocation(HEADLESS)
    assert found is not None and found.runs and found.orphaned and found.batch_host == "n3"


@pytest.mark.parametrize(
    ("first", "second", "runs"),
    [("RUNNING", "RUNNING", True), ("RUNNING", "NODE_FAIL", True), ("COMPLETING", "RUNNING", True),
     ("NODE_FAIL", "CANCELLED", False), ("PENDING", "PENDING", False)],
)  # fmt: skip
def test_a_heterogeneous_job_with_its_script_is_no_orphan(first: str, second: str, runs: bool) -> None:
    text = HEADLESS.replace("JobState=RUNNING", f"JobState={second}").replace("NODE_FAIL", first, 1)
    found = read_allocation(text)
    assert found is not None and found.runs == runs and not found.orphaned


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error: Invalid job id specified\n"])
def test_what_is_no_job(text: str) -> None:
    assert read_allocation(text) is None


def test_slurm_is_asked_for_one_job(fake: FakeSlurm) -> None:
    slurm = SlurmScheduler(environ=fake.environ)
    fake.says("scontrol", ORPHAN.replace("Requeue=0", "Requeue=1"))
    found = slurm.allocation("29")
    assert found is not None and found.requeues
    slurm.requeue("29")
    assert fake.calls() == ["scontrol show job --oneliner 29", "scontrol requeue 29"]


def test_a_job_that_slurm_forgot_and_a_slurm_that_is_down_are_told_apart(fake: FakeSlurm) -> None:
    slurm = SlurmScheduler(environ=fake.environ)
    fake.says("scontrol", "", error="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert slurm.allocation("29") is None
    with pytest.raises(SlurmError, match="Invalid job id"):
        slurm.requeue("29")
    fake.is_down()
    with pytest.raises(SlurmDown):
        slurm.allocation("29")
