"""A whole job of fake engines on loopback, started as a job script starts it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from hpcserve.plan.plan import Plan
from hpcserve.rundir.atomic import read_json
from hpcserve.rundir.layout import RunDir
from tests.patience import DEADLINE

from .runs import environment, events, finish, make_run, node_program, start, wait_for


class Job:
    """Use as a context manager: nothing is left running afterwards."""

    def __init__(self, path: Path, plan: Plan, **env: str) -> None:
        self.run: RunDir = make_run(path, plan)
        self.plan = plan
        self.env = env
        self.agents: list[subprocess.Popen[str]] = []
        self.head: subprocess.Popen[str] | None = None

    def __enter__(self) -> Job:
        meeting = [
            start(
                node_program("rendezvous", self.run, "--transport", "tcp", "--timeout", "60"),
                environment(rank, **self.env),
            )
            for rank in range(self.plan.nodes)
        ]
        for process in meeting:
            status, output = finish(process)
            assert status == 0, output
        if self.plan.model.stage:
            staging = [self._start("stage", rank) for rank in range(self.plan.nodes)]
            for process in staging:
                assert process.wait(DEADLINE) == 0, self.log("stage-0")
        self.agents = [self._start("agent", rank) for rank in range(self.plan.nodes)]
        self.head = self._start("head", None)
        return self

    def _start(self, program: str, rank: int | None) -> subprocess.Popen[str]:
        log = self.run.logs / (f"{program}.log" if rank is None else f"{program}-{rank}.log")
        return start(node_program(program, self.run), environment(rank, **self.env), log)

    def __exit__(self, *_: object) -> None:
        for process in (self.head, *self.agents):
            if process is not None and process.poll() is None:
                process.kill()
            if process is not None:
                process.wait(DEADLINE)

    def wait(self, name: str, seconds: float = DEADLINE, **fields: Any) -> dict[str, Any]:
        """The first event of that name with those fields; fails early when the run failed."""

        def look() -> dict[str, Any] | None:
            found = [
                event
                for event in events(self.run, name)
                if all(event.get(key) == value for key, value in fields.items())
            ]
            if not found and name != "failed":
                failed = events(self.run, "failed")
                assert not failed, f"{failed}\n{self.log('head')}"
            return found[0] if found else None

        try:
            return wait_for(look, f"event {name} {fields}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log('head')}") from None

    def log(self, program: str) -> str:
        path = self.run.logs / f"{program}.log"
        return path.read_text() if path.exists() else ""

    def ask(self, method: str, path: str, key: str | None = "job-secret") -> tuple[int, Any]:
        """A call to the controller."""
        head = read_json(self.run.head)
        connection = http.client.HTTPConnection(head["address"], head["port"], timeout=10)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def complete(self, prompt: str = "Once upon a time", **more: Any) -> tuple[int, Any]:
        """One completion through the router."""
        endpoint = read_json(self.run.endpoint)
        connection = http.client.HTTPConnection(endpoint["host"], endpoint["port"], timeout=30)
        body = {"model": endpoint["served_name"], "prompt": prompt, "max_tokens": 8, **more}
        headers = {"Authorization": "Bearer api-secret", "Content-Type": "application/json"}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def replica(self, name: str) -> dict[str, Any]:
        _, status = self.ask("GET", "/status")
        return next(entry for entry in status["replicas"] if entry["name"] == name)

    def engine_pid(self, name: str) -> int:
        """The process that listens on the replica's URL, found among the agents' engines."""
        port = self.replica(name)["url"].rpartition(":")[2]
        for pid, command in processes():
            if "hpcserve.engines.fake_server" in command and f"--port {port} " in command + " ":
                return pid
        raise AssertionError(f"no engine process for {name}")

    def left(self) -> list[str]:
        """Command lines of engines and routers of this run that still live."""
        marks = [str(self.run.path)]
        marks += [f"--port {event['url'].rpartition(':')[2]} " for event in events(self.run, "engine-ready")]
        return [
            command
            for _, command in processes()
            if ("fake_server" in command or "hpcserve." in command)
            and any(mark in command + " " for mark in marks)
        ]

    def stop_by_signal(self) -> int:
        """SIGTERM to the head, as the job script passes it on; the head's exit status."""
        assert self.head is not None
        self.head.send_signal(signal.SIGTERM)
        return self.head.wait(60)


def processes() -> list[tuple[int, str]]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if command:
                found.append((int(entry), command))
    return found
