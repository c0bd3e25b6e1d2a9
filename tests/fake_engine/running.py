"""A fake engine in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests.patience import DEADLINE

KEY_VARIABLE = "FAKE_ENGINE_API_KEY"


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value; fails the test after a deadline."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {DEADLINE} s for {what}")


class FakeEngine:
    """Started with flags; `stop()` is called by the fixture."""

    def __init__(self, log: Path, *flags: str, key: str | None = None, model: str = "toy") -> None:
        self.log = log
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environ.pop(KEY_VARIABLE, None)
        if key is not None:
            environ[KEY_VARIABLE] = key
        argv = [sys.executable, "-m", "hpcserve.engines.fake_server", "--model", model, "--port", "0"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*argv, "--itl-ms", "1", *flags], stdout=output, stderr=subprocess.STDOUT, env=environ
            )
        self.session = requests.Session()
        self.session.trust_env = False
        if key is not None:
            self.session.headers["authorization"] = f"Bearer {key}"

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        """Waits until the engine says where it listens."""

        def listening() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the engine exited with {self.process.returncode}:\n{self.output}")
            found = re.search(r"Starting vLLM server on (http://\S+)", self.output)
            done = "Application startup complete." in self.output
            return found[1] if found and done else None

        return str(wait_until(listening, "the engine to start"))

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=DEADLINE, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return self.session.post(self.url + path, json=body, timeout=DEADLINE, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer of /v1/completions, which must be 200."""
        response = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, prompt: Any, **fields: Any) -> str:
        return str(self.complete(prompt, **fields)["choices"][0]["text"])

    def fail(self, mode: str, **fields: Any) -> None:
        assert self.post("/fake/fail", {"mode": mode, **fields}).status_code == 200

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, whatever its model_name and engine; fails the test if it is absent."""
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith(name + "{"):
                continue
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}{labels}")

    def stop(self) -> None:
        self.session.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)
