"""A run of `hpcserve launch --site local`, and what its router says it counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests

_CHECKOUT = Path(__file__).parents[2]
_START = 400
"""Seconds until READY on a busy machine of two cores."""
_LEDGER = 20.0
"""Seconds for the ledger to catch up; it is written every five."""
_OWN = ("/metrics", "/health", "/v1/models")
"""Routes that no engine answers."""
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')

T = TypeVar("T")
Samples = Mapping[str, list[tuple[dict[str, str], float]]]
Used = tuple[int, int, int]
"""Requests, prompt tokens, completion tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted up to now, or in between."""

    answers: Mapping[tuple[str, int], int]
    """By route and status."""
    prompt: int
    completion: int
    faults: int
    """Errors, retries, cancelled requests, broken streams and refusals."""
    transferred: int
    """Answers written with a prefill worker's KV."""
    ledger: Used
    """As it was just before."""


class LaunchedRun:
    """`run.start()` returns at READY."""

    def __init__(self, folder: Path, model: str, *, nodes: int) -> None:
        self._folder = folder
        self._nodes = nodes
        self._spec = folder / "model.yaml"
        self._spec.write_text(model)
        self._run = folder / "runs" / "clients"
        self.url = ""
        self.key = ""

    def hpcserve(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HPCSERVE_")}
        env |= {"HPCSERVE_RUNS": str(self._run.parent), "PYTHONPATH": str(_CHECKOUT)}
        argv = [sys.executable, "-m", "hpcserve", *words]
        return subprocess.run(argv, env=env, text=True, capture_output=True, timeout=timeout)

    def start(self, seconds: float = _START) -> None:
        words = ("launch", "--site", "local", "--nodes", str(self._nodes), "--name", self._run.name)
        done = self.hpcserve(*words, str(self._spec), timeout=seconds)
        assert done.returncode == 0, f"{done.stderr[-3000:]}\n{self._logs()}"
        self.url = json.loads((self._run / "endpoint.json").read_text())["url"]
        self.key = (self._run / "secrets" / "api-key").read_text().strip()
        # What the launcher asked itself, for its proof, is written down before the first test looks.
        _until(self._ledger, lambda used: used[0] > 0, "the ledger's first line", _LEDGER)

    @property
    def name(self) -> str:
        return self._run.name

    @property
    def job_key(self) -> str:
        return (self._run / "secrets" / "job-key").read_text().strip()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The run's events of that name, in order."""
        events = map(json.loads, (self._run / "events.jsonl").read_text().splitlines())
        return [event for event in events if event["event"] == name]

    def stop(self) -> None:
        if self._run.exists():
            self.hpcserve("stop", self._run.name, "--wait", "0")
            self.hpcserve("stop", self._run.name, "--wait", "30")  # a second one doesn't drain

    def _logs(self) -> str:
        logs = sorted((self._run / "logs").glob("*"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    # What was counted

    def counts(self) -> Counts:
        """Once nothing is in flight. The ledger is read as it is: `ledger_since()` waits for it."""
        return _counts(self._idle(), self._ledger())

    def counted_since(self, before: Counts) -> Counts:
        now = _counts(self._idle(), before.ledger)
        routes = {
            place: count - before.answers.get(place, 0)
            for place, count in now.answers.items()
            if count != before.answers.get(place, 0)
        }
        return Counts(
            answers=routes,
            prompt=now.prompt - before.prompt,
            completion=now.completion - before.completion,
            faults=now.faults - before.faults,
            transferred=now.transferred - before.transferred,
            ledger=before.ledger,
        )

    def ledger_since(self, before: Counts, expected: Used) -> Used:
        """What `hpcserve usage` shows more than before: `expected`, or what it is in the end."""

        def since() -> Used:
            used = self._ledger()
            return used[0] - before.ledger[0], used[1] - before.ledger[1], used[2] - before.ledger[2]

        deadline = time.monotonic() + _LEDGER
        while (found := since()) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _idle(self) -> Samples:
        def quiet(samples: Samples) -> bool:
            return samples["hpcserve_router_in_flight"][0][1] == 0

        return _until(self._metrics, quiet, "the router to be idle", 30.0)

    def _metrics(self) -> Samples:
        url = self.url.removesuffix("/v1") + "/metrics"
        response = requests.get(url, headers={"Authorization": f"Bearer {self.key}"}, timeout=20)
        assert response.status_code == 200, response.text
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in response.text.splitlines():
            if sample := _SAMPLE.match(line):
                labels = dict(_LABEL.findall(sample[2] or ""))
                found.setdefault(sample[1], []).append((labels, float(sample[3])))
        return found

    def _ledger(self) -> Used:
        done = self.hpcserve("usage", "--by", "run", "--json")
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        used = [(row["requests"], row["prompt_tokens"], row["completion_tokens"]) for row in rows]
        return used[0] if used else (0, 0, 0)


def _counts(samples: Samples, ledger: Used) -> Counts:
    def total(name: str, **wanted: str) -> int:
        values = samples[f"hpcserve_router_{name}_total"]
        return int(sum(value for labels, value in values if wanted.items() <= labels.items()))

    answers = {
        (labels["route"], int(labels["status"])): int(value)
        for labels, value in samples["hpcserve_router_requests_total"]
        if labels and labels["route"] not in _OWN
    }
    return Counts(
        answers=answers,
        prompt=total("prompt_tokens"),
        completion=total("generation_tokens"),
        faults=sum(
            total(name) for name in ("errors", "retries", "cancelled", "broken_streams", "requests_shed")
        ),
        transferred=total("kv_legs", result="transferred"),
        ledger=ledger,
    )


def _until(look: Callable[[], T], good: Callable[[T], bool], what: str, seconds: float) -> T:
    deadline = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {found}"
        time.sleep(0.3)
    return found
