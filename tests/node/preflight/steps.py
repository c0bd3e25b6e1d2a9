"""A preflight step as a job script starts it, with real NIXL processes on loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcserve.plan.plan import Plan, ReplicaPlan
from hpcserve.rundir.atomic import read_json
from hpcserve.rundir.layout import RunDir
from tests.node.runs import environment, events, finish, make_plan, make_run, node_program, start
from tests.patience import DEADLINE


def vllm_plan(*replicas: ReplicaPlan, **env: str) -> Plan:
    """Prefill and decode replicas of vLLM on the CPU, one or more nodes on loopback."""
    plan = make_plan(1 + max(rank for replica in replicas for rank in replica.nodes), *replicas)
    return replace(plan, model=replace(plan.model, engine="vllm", model="test/model", env=env))


class Step:
    """The ranks of one step, after a rendezvous. Use as a context manager: nothing is left running."""

    def __init__(
        self, path: Path, plan: Plan, *, ranks: Mapping[int, Mapping[str, str]] | None = None
    ) -> None:
        self.run: RunDir = make_run(path, plan)
        self.plan = plan
        self._more = ranks or {}
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Step:
        meeting = [
            start(
                node_program("rendezvous", self.run, "--transport", "tcp", "--timeout", "60"),
                environment(rank),
            )
            for rank in range(self.plan.nodes)
        ]
        for process in meeting:
            status, output = finish(process)
            assert status == 0, output
        self.processes = [
            start(
                node_program("preflight", self.run),
                environment(rank, **self._more.get(rank, {})),
                self.run.logs / f"preflight-{rank}.log",
            )
            for rank in range(self.plan.nodes)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE)

    def finish(self) -> list[int]:
        """Exit statuses, by rank."""
        return [process.wait(2 * DEADLINE) for process in self.processes]

    def log(self, rank: int = 0) -> str:
        return (self.run.logs / f"preflight-{rank}.log").read_text()

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.preflight)
        return found

    def event(self) -> dict[str, Any]:
        [event] = events(self.run, "preflight")
        return event

    def warnings(self) -> list[str]:
        return [event["message"] for event in events(self.run, "warning")]
