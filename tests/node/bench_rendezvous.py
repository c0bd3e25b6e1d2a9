"""CPU time of rank 0 in a TCP rendezvous of many ranks: `python -m tests.node.bench_rendezvous [RANKS]`.

Rank 0 is the real program in a process of its own; the others are simulated in this one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from hpcserve.node.discovery.facts import gather
from hpcserve.node.inputs import load_inputs
from hpcserve.node.rendezvous.meeting import Attendance, Meeting
from hpcserve.node.rendezvous.tcp import join
from hpcserve.rundir.layout import RunDir

from .runs import environment, make_plan, make_run, node_program


async def simulate(run: RunDir, ranks: int) -> list[str | None]:
    """Ranks 1 … ranks-1; the message of each one's verdict, None for a good one."""
    inputs = load_inputs(run.path, environment())
    facts = gather(inputs.plan, 1, inputs.environ)

    async def one(rank: int) -> str | None:
        meeting = Meeting(
            run=run,
            plan=inputs.plan,
            rank=rank,
            attempt=inputs.attempt,
            transport="tcp",
            environ=inputs.environ,
            key=inputs.job_key.encode(),
            started=time.monotonic(),
            timeout=60,
        )
        meeting.announce()
        return (await join(meeting, replace(facts, rank=rank), Attendance(meeting, None))).message

    return await asyncio.gather(*(one(rank) for rank in range(1, ranks)))


def measure(directory: Path, ranks: int) -> tuple[int, float, list[str | None]]:
    """Exit status and CPU seconds of rank 0 (start-up of Python included), and all verdicts."""
    run = make_run(directory, make_plan(ranks))
    command = node_program("rendezvous", run, "--transport", "tcp", "--timeout", "60")
    pid = os.posix_spawn(command[0], command, environment(0))
    verdicts = asyncio.run(simulate(run, ranks))
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, verdicts


def main() -> None:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    with tempfile.TemporaryDirectory() as directory:
        status, cpu, verdicts = measure(Path(directory) / "run", ranks)
    good = sum(verdict is None for verdict in verdicts) + 1
    print(f"{ranks} ranks, {good} met, rank 0: exit status {status}, {cpu:.2f} s CPU")


if __name__ == "__main__":
    main()
