"""A batch on real Slurm while its processes and nodes are killed: `python -m tests.cluster.batch_chaos`.

Two jobs of one prefill and one decode node work on it. Every few seconds one of their drivers, engines,
routers, agents or heads gets SIGKILL, or a whole node dies and comes back; what Slurm ends is submitted again
with the same command. Brings the test cluster up and down; needs root, as tests/cluster does.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from hpcserve.slurm.allocation import read_allocation

from . import testbed
from .launched import Launches
from .test_batch import MODEL, Batch
from .testbed import Testbed

USER = "hsuser"
LANES = 2
FLAGS = ("--walltime=01:00:00", "--set=engine_args.itl-ms=25", "--set=engine_args.max-num-seqs=16")
VICTIMS = {
    "driver": "hpcserve.batch drive",
    "engine": "hpcserve.engines.fake_server",
    "router": "hpcserve.router",
    "agent": "hpcserve.node agent",
    "head": "hpcserve.node head",
}
"""What is killed, and how its command line is known."""
NODE = "node"
_PATIENCE = 3000.0


class Chaos:
    def __init__(self, cluster: Testbed, *, rows: int, kills: int, pause: float, seed: int) -> None:
        self._cluster = cluster
        self._rows = rows
        self._kills = kills
        self._pause = pause
        self._random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.jobs = 0
        self.freed = 0
        """Jobs whose head node died in their last seconds, when no agent was left to end them."""
        lines = []
        for number in range(rows):
            body = {
                "model": "fake",
                "prompt": f"row {number}",
                "max_tokens": 1 + number % 24,
                "ignore_eos": True,
            }
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            lines.append(json.dumps(line) + "\n")
        launches = Launches(cluster, USER)
        model = launches.file("chaos.yaml", MODEL)
        self._batch = Batch(launches, model, launches.file("chaos.jsonl", "".join(lines)))
        self._out = self._batch.out
        shutil.rmtree(self._out, ignore_errors=True)

    def run(self) -> float:
        """Seconds until the output was complete. Raises TimeoutError."""
        began = time.monotonic()
        killed_at, done_then = began, 0
        while not self._batch.complete:
            if time.monotonic() - began > _PATIENCE:
                raise TimeoutError(f"not complete after {_PATIENCE:g} s, with {dict(self.killed)} killed")
            self._free_orphans()
            self._submit()
            time.sleep(0.5)
            done = self._batch.done
            # Something must come of each life.
            due = done > done_then and time.monotonic() - killed_at > self._pause
            if due and self.killed.total() < self._kills and self._kill():
                killed_at, done_then = time.monotonic(), done
        return time.monotonic() - began

    def verdict(self) -> str:
        """Raises AssertionError for a row that is missing or twice there, and for an error, but for that of a
        row that three engines died with."""
        answers, errors = (
            [json.loads(line) for line in (self._out / name).read_text().splitlines()]
            for name in ("output.jsonl", "errors.jsonl")
        )
        ids = Counter(line["custom_id"] for line in (*answers, *errors))
        assert ids == Counter({f"r{number}": 1 for number in range(self._rows)}), (
            "rows are missing or doubled"
        )
        assert {line["error"]["code"] for line in errors} <= {"engine_died"}, errors[:10]
        again = json.loads((self._out / "report.json").read_text())["computed_more_than_once"]
        return (
            f"each row once, {len(errors)} of them errors after three engines died with them;"
            f" computed again {again} ({again / self._rows:.2%})"
        )

    def _submit(self) -> None:
        """The same command again, for each job that is missing."""
        jobs = len(self._cluster.slurm("squeue", "--noheader", "--states=PD,R,CG").split("\n")) - 1
        up = [host.name for host in self._cluster.hosts if self._cluster.is_up(host.name)]
        for _ in range(min(LANES - jobs, len(up) // 2)):
            self._batch.submit(*FLAGS)
            self.jobs += 1
            if self._batch.complete:
                return

    def _free_orphans(self) -> None:
        """What their user does with `scancel`: Slurm would keep the nodes until the walltime."""
        for job in self._cluster.slurm("squeue", "--noheader", "--states=R", "--format=%i").split():
            allocation = read_allocation(self._cluster.slurm("scontrol", "show", "job", "--oneliner", job))
            if allocation is None or not allocation.orphaned:
                continue
            if not any(self._cluster.commands_of(USER, node) for node in allocation.nodes):
                self._cluster.as_user(USER, ["scancel", job])
                self.freed += 1

    def _kill(self) -> bool:
        victim = self._random.choices([*VICTIMS, NODE], weights=[3, 4, 2, 2, 1, 1])[0]
        if victim == NODE:
            name = self._random.choice(self._cluster.hosts).name
            self._cluster.kill_node(name, power_cut=self._random.random() < 0.5)
            self.killed[victim] += 1
            time.sleep(self._random.uniform(0.0, 3.0))
            self._cluster.revive_node(name)
            return True
        pids = self._pids(VICTIMS[victim])
        if not pids:
            return False
        try:
            os.kill(self._random.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False  # it ended by itself
        self.killed[victim] += 1
        return True

    def _pids(self, command: str) -> list[int]:
        """The user's processes on all nodes with this in their command line."""
        uid = pwd.getpwnam(USER).pw_uid
        found = []
        for host in self._cluster.hosts:
            for pid in self._cluster.processes(host.name):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                    if command in words and Path(f"/proc/{pid}").stat().st_uid == uid:
                        found.append(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended while we looked
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two kills, at the least")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with testbed.machine_lock():
        cluster = testbed.up()
        try:
            chaos = Chaos(cluster, **vars(options))
            seconds = chaos.run()
        finally:
            testbed.down()
    print(f"{options.rows} rows, killed {dict(chaos.killed)}; {chaos.jobs} jobs in {seconds:.0f} s")
    print(f"{chaos.freed} jobs lost their head node in their last seconds and were cancelled by hand")
    print(chaos.verdict())
    return 0


if __name__ == "__main__":
    sys.exit(main())
