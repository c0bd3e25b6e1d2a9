"""What a user on the login node does with `hpcserve`, and what a test reads of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.patience import DEADLINE

from . import paths
from .testbed import Testbed, wait_for

_HPCSERVE = (str(paths.PYTHON), "-m", "hpcserve")


@dataclass(frozen=True, slots=True)
class Launches:
    """`hpcserve` as one user."""

    cluster: Testbed
    user: str

    def hpcserve(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return self.cluster.as_user(self.user, [*_HPCSERVE, *arguments], env, timeout=timeout, check=check)

    def file(self, name: str, text: str) -> Path:
        """A file in the user's home directory."""
        path = self.cluster.home(self.user) / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def launch(
        self, model: str, *flags: str, name: str, nodes: int = 4, site: str = "test-cluster"
    ) -> Launched:
        """`hpcserve launch --no-wait` of a model.yaml with this text."""
        spec = self.file(f"{name}.yaml", model)
        done = self.hpcserve(
            "launch", f"--nodes={nodes}", f"--site={site}", "--json", "--no-wait", f"--name={name}",
            *flags, str(spec),
        )  # fmt: skip
        return Launched(self, json.loads(done.stdout))


@dataclass(frozen=True, slots=True)
class Launched:
    """A run that was submitted."""

    launches: Launches
    answer: Mapping[str, Any]
    """What `hpcserve launch --json` printed."""

    @property
    def run_dir(self) -> Path:
        return Path(self.answer["directory"])

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def job_id(self) -> str:
        return str(self.answer["job_id"])

    @property
    def api_key(self) -> str:
        return (self.run_dir / "secrets" / "api-key").read_text().strip()

    @property
    def job_key(self) -> str:
        return (self.run_dir / "secrets" / "job-key").read_text().strip()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        try:
            lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        events = [json.loads(line) for line in lines]
        return [event for event in events if name is None or event["event"] == name]

    def wait_ready(self, seconds: float = DEADLINE) -> None:
        """Wait for READY; a failed run fails at once, with its own words."""

        def ready() -> bool:
            failed = self.events("failed")
            assert not failed, f"{failed}\n{self.logs()}"
            assert not self.gone(), f"the job ended without a word\n{self.logs()}"
            return bool(self.events("ready"))

        wait_for(ready, seconds=seconds, what=f"{self.name} to be READY", state=self.logs)

    def logs(self) -> str:
        """The end of every log, for a failure's message."""
        parts = []
        for log in sorted((self.run_dir / "logs").glob("*")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        queue = self.launches.cluster.slurm("squeue")
        return "\n".join([queue, *(json.dumps(event) for event in self.events()), *parts])

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.launches.hpcserve("status", "--json", self.name).stdout)
        return answer

    def controller(self) -> dict[str, Any]:
        """The controller's part of `hpcserve status --json`."""
        status = self.status()
        assert status["source"] == "controller", status
        answer: dict[str, Any] = status["controller"]
        return answer

    def workers(self) -> dict[str, dict[str, Any]]:
        """The router's table, by replica name."""
        return {worker["name"]: worker for worker in self.controller()["workers"]}

    def stop(self) -> None:
        self.launches.hpcserve("stop", self.name)

    def cancel(self) -> None:
        """End the job the hard way, whatever state it and its nodes are in."""
        self.launches.cluster.repair()  # Slurm waits long for dead nodes to confirm a job's end
        self.launches.cluster.as_user(self.launches.user, ["scancel", self.job_id], check=False)
        self.wait_gone()

    def gone(self) -> bool:
        """Slurm has no such job any more."""
        query = ("squeue", "--noheader", "--jobs", self.job_id, "--states=PENDING,RUNNING,COMPLETING")
        return not self.launches.cluster.slurm(*query, check=False).strip()

    def wait_gone(self) -> None:
        wait_for(self.gone, what=f"job {self.job_id} to end", state=self.logs)

    def node_of(self, replica: str, place: int = 0) -> str:
        """Name of a node that carries a replica; its first one has the replica's head."""
        plan = json.loads((self.run_dir / "plan.json").read_text())
        rank = next(item["nodes"][place] for item in plan["replicas"] if item["name"] == replica)
        roster = json.loads((self.run_dir / "roster.json").read_text())
        node: str = next(item["node"] for item in roster["ranks"] if item["rank"] == rank)
        return node

    # Requests

    @property
    def url(self) -> str:
        url: str = json.loads((self.run_dir / "endpoint.json").read_text())["url"]
        return url

    def request(
        self, path: str, body: Any = None, *, key: str | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """One request to the endpoint: its status and JSON answer. `key=""` sends none."""
        response = self._send(path, body, self.api_key if key is None else key, timeout)
        with response:
            try:
                return response.status_code, response.json()
            except ValueError:
                return response.status_code, response.text

    def stream(self, body: Mapping[str, Any], timeout: float = 60) -> Iterator[dict[str, Any]]:
        """The events of one streamed completion, up to `[DONE]`; a cut stream raises an OSError."""
        with self._send("/completions", {**body, "stream": True}, self.api_key, timeout) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines(chunk_size=1):
                if line.startswith(b"data: "):
                    data = line.removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    yield json.loads(data)
        raise ConnectionError("the stream ended before [DONE]")

    def fail_engine(self, replica: str, command: Mapping[str, Any]) -> None:
        """Order a fake engine to fail; it may be gone before it answers."""
        url = self.workers()[replica]["url"]
        with contextlib.suppress(requests.ConnectionError):
            requests.post(f"{url}/fake/fail", json=command, headers=bearer(self.job_key), timeout=20).close()

    def _send(self, path: str, body: Any, key: str, timeout: float) -> requests.Response:
        method = "GET" if body is None else "POST"
        return requests.request(
            method, self.url + path, json=body, headers=bearer(key), timeout=timeout, stream=True
        )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
