"""Text of the cluster's Slurm configuration files (Slurm 22.05)."""

from __future__ import annotations

from . import paths
from .namespaces import LOGIN_ADDRESS, Host

GPUS_PER_NODE = 4
CORES_PER_NODE = 8
"""More than the machine has: Slurm hands them out, the kernel shares the real ones."""


def _small(host: Host) -> bool:
    """Nodes 3 and 4 play another type of node, for heterogeneous jobs."""
    return host.index in (3, 4)


def _gpu_type(host: Host) -> str:
    """The same for all GPUs of a node: Slurm 22.05 allots untyped ones of several types, and then starts no
    step with as many."""
    return "small" if _small(host) else "big"


def slurm_conf(hosts: list[Host], login: str) -> str:
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} NodeHostname={host.name} Sockets=1 "
        f"CoresPerSocket={CORES_PER_NODE} ThreadsPerCore=1 RealMemory=20000 "
        f"Gres=gpu:{_gpu_type(host)}:{GPUS_PER_NODE} State=UNKNOWN"
        for host in hosts
    )
    names = ",".join(host.name for host in hosts)
    big = ",".join(host.name for host in hosts if not _small(host))
    small = ",".join(host.name for host in hosts if _small(host))
    typed = "\n".join(
        f"PartitionName={name} Nodes={members} MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO State=UP"
        for name, members in (("big", big), ("small", small))
        if members
    )
    return f"""\
ClusterName=hpcserve-test
SlurmctldHost={login}({LOGIN_ADDRESS})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={paths.MUNGE_SOCKET}
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={paths.RUN}/state
SlurmdSpoolDir={paths.RUN}/spool/%n
SlurmctldPidFile={paths.RUN}/slurmctld.pid
SlurmdPidFile={paths.RUN}/slurmd-%n.pid
SlurmctldLogFile={paths.LOGS}/slurmctld.log
SlurmdLogFile={paths.LOGS}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig={paths.RUN}/plugstack.conf
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=30
KillWait=30
CompleteWait=0
MessageTimeout=10
JobRequeue=0
MinJobAge=600
SchedulerParameters=batch_sched_delay=0,defer_batch=0,bf_interval=2
PropagateResourceLimitsExcept=MEMLOCK
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO State=UP
PartitionName=urgent Nodes={names} MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO PriorityTier=10 State=UP
{typed}
"""


def gres_conf(hosts: list[Host]) -> str:
    files = f"{paths.GPUS}/gpu[0-{GPUS_PER_NODE - 1}]"
    nodes = (f"NodeName={host.name} Name=gpu Type={_gpu_type(host)} File={files}" for host in hosts)
    return "\n".join(["AutoDetect=off", *nodes, ""])


def mpi_conf() -> str:
    """PMIx needs a directory that the nodes do not share."""
    return "PMIxCliTmpDirBase=/run/pmix\n"


def plugstack_conf() -> str:
    """srun and each step's slurmstepd read it anew, so plugins can come and go while the cluster is up."""
    return f"include {paths.PLUGINS}/*.conf\n"


def cgroup_conf() -> str:
    return "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainDevices=no\n"
