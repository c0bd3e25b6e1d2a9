"""Rendezvous over MPI: one allgather, then MPI is over for the rest of the job.

MPI runs in a forked child. MPI_Init blocks without giving other Python threads a turn when a rank
never comes, so only another process can keep the deadline and name who is missing.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping

import msgspec

from ...plan.plan import Plan
from ..discovery.facts import RankFacts, facts_from_json, to_json
from ..process import die_with_parent
from .meeting import Attendance, Meeting, TransportUnusable, Verdict, verdict_from_json

_PLUGINS = "see `srun --mpi=list`, and set `slurm.mpi` of the site config"
_SETTLE = 0.1
"""Seconds between MPI_Init and the first message."""


def mpi_environment(plan: Plan) -> Mapping[str, str]:
    """Variables that keep Open MPI on TCP: queue pairs and registered memory belong to the engines.

    Other MPIs ignore them. `vader` is Open MPI 4's name for shared memory, which 5 still knows.
    """
    network = plan.site.network
    loopback = plan.site.scheduler == "local" or network.kind == "loopback"
    interface = "lo" if loopback else network.control_interface
    settings = {
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self,vader",
        "OMPI_MCA_osc": "^ucx",
        "OMPI_MCA_coll": "^hcoll,ucc",
    }
    if interface is not None:
        settings["OMPI_MCA_btl_tcp_if_include"] = interface
    return settings


def meet(meeting: Meeting, facts: RankFacts, attendance: Attendance) -> Verdict:
    """Exchange facts. Raises TransportUnusable when MPI does not work here, RendezvousError when late."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        os.close(reading)
        _child(meeting, facts, writing)
    os.close(writing)
    try:
        told = _listen(meeting, reading, attendance)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if not told:
        code = os.waitstatus_to_exitcode(status)
        raise TransportUnusable(
            f"MPI ended rank {meeting.rank} with status {code} before the ranks met;"
            " its own message is above",
            hint=f"the MPI library and Slurm's MPI plugin do not fit: {_PLUGINS}",
        )
    return verdict_from_json(msgspec.json.decode(told))


def _listen(meeting: Meeting, pipe: int, attendance: Attendance) -> bytes:
    """The child's verdict; empty when it died without one."""
    told = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], min(0.1, meeting.left()))
        if ready:
            data = os.read(pipe, 65536)
            if not data:
                attendance.record()
                return told
            told += data
        elif meeting.left() <= 0:
            raise meeting.missing()
        attendance.look()


def _child(meeting: Meeting, facts: RankFacts, pipe: int) -> None:
    """Never returns."""
    status = 1
    try:
        for name, value in mpi_environment(meeting.plan).items():
            os.environ.setdefault(name, value)
        try:
            verdict = _allgather(meeting, facts)
        except TransportUnusable as error:
            verdict = Verdict.of(error)
        os.write(pipe, msgspec.json.encode(verdict))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _allgather(meeting: Meeting, facts: RankFacts) -> Verdict:
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise TransportUnusable(
            f"mpi4py can't load an MPI library on {facts.node}: {error}",
            hint="load the site's MPI module in `setup`, or set `slurm.mpi: none` to use TCP",
        ) from error
    MPI.Init()
    # Open MPI 5.0.11 can crash in MPI_Init on a rank that gets a message before it is done there
    # (mca_pml_ob1_recv_frag_callback_match), so nobody sends at once.
    time.sleep(_SETTLE)
    world = MPI.COMM_WORLD
    try:
        _check_world(meeting, world.size, world.rank)
    except TransportUnusable:
        MPI.Finalize()
        raise
    gathered = world.allgather(msgspec.json.encode(to_json(facts)))
    verdict = None
    if meeting.rank == 0:
        found = [facts_from_json(msgspec.json.decode(entry)) for entry in gathered]
        verdict = msgspec.to_builtins(meeting.conclude(found))
    verdict = world.bcast(verdict, root=0)
    MPI.Finalize()
    return verdict_from_json(verdict)


def _check_world(meeting: Meeting, size: int, rank: int) -> None:
    if size == 1 and meeting.size > 1:
        raise TransportUnusable(
            f"MPI gives each rank a world of its own: COMM_WORLD has 1 rank, {meeting.size} were expected",
            hint=f"the step was started with an `--mpi` plugin this MPI library does not speak: {_PLUGINS}",
        )
    if size != meeting.size:
        raise TransportUnusable(
            f"MPI's COMM_WORLD has {size} ranks, {meeting.size} were expected",
            hint="start as many tasks as the plan has nodes, one on each",
        )
    if rank != meeting.rank:
        raise TransportUnusable(
            f"MPI calls this process rank {rank}, and its launcher calls it rank {meeting.rank}",
            hint="is HPCSERVE_RANK, SLURM_PROCID or PMIX_RANK exported by something else?",
        )
