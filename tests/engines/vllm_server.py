"""Real vLLM on the CPU, started as an agent would start a replica."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

from hpcserve import engines
from hpcserve.config.model import ModelSpec
from hpcserve.config.site import Site
from tests.patience import DEADLINE
from tests.router.migration.field import free_port

from .cases import context

KEY = "job-key"
START = 600
"""Seconds that a server with two engines may take on a busy machine of two cores."""
_SOURCES = "vllm:prompt_tokens_cached_by_source_total"


class Server:
    """One replica's API."""

    def __init__(
        self,
        spec: ModelSpec,
        at: Site,
        scratch: str,
        *,
        replica: str = "aggregated-0",
        cpus: tuple[tuple[int, ...], ...],
        **more: Any,
    ) -> None:
        """`more` is the context's."""
        made = context(
            spec, at, replica=replica, address="127.0.0.1", head_address="127.0.0.1", python=sys.executable,
            scratch=scratch, cpus=cpus, start=f"{replica}-{uuid.uuid4().hex}", **more,
        )  # fmt: skip
        ports = {name: str(free_port()) for name in made.ports}
        command = engines.of(spec).command(replace(made, ports=ports))
        self.url = f"http://127.0.0.1:{ports['http']}"
        self.log = Path(scratch) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.env, "VLLM_API_KEY": KEY},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except requests.RequestException:
            return False

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=_headers(), timeout=60)

    def ask(self, body: Mapping[str, Any], rank: int | None = None) -> Any:
        more = {} if rank is None else {"x-data-parallel-rank": str(rank)}
        return requests.post(f"{self.url}/v1/completions", json=body, headers=_headers(more), timeout=300)

    def tokens(self, body: Mapping[str, Any], rank: int | None = None) -> list[int]:
        answer = self.ask(body, rank)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    def counted(self, rank: int = 0) -> dict[str, float]:
        """Tokens, as the rank's own counters have them."""
        page, by = self.get("/metrics").text, f'engine="{rank}"'
        return {
            "generated": _sum(page, "vllm:generation_tokens_total", by),
            "in cache": _sum(page, "vllm:prefix_cache_hits_total", by),
            "in memory": _sum(page, _SOURCES, by, 'source="host"'),
            "in files": _sum(page, _SOURCES, by, 'source="disk"'),
            "computed": _sum(page, "vllm:prompt_tokens_by_source_total", by, 'source="local_compute"'),
        }

    def grown(self, before: Mapping[str, float], generated: int, rank: int = 0) -> dict[str, float]:
        """What is new since `before`, once it has generated so many more tokens."""
        wanted = before["generated"] + generated
        self.wait(lambda: self.counted(rank)["generated"] == wanted, DEADLINE)
        return {name: value - before[name] for name, value in self.counted(rank).items()}

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DEADLINE)
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)


def greedy_request(prompt: str | Sequence[int], tokens: int, **more: Any) -> dict[str, Any]:
    """The most likely `tokens` tokens, by their ids."""
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def _headers(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", **(more or {})}


def _sum(page: str, name: str, *labels: str) -> float:
    samples = re.findall(rf"^{re.escape(name)}\{{([^}}]*)\}} (\S+)$", page, re.MULTILINE)
    return sum(float(value) for found, value in samples if all(label in found for label in labels))
