"""The fake engines of a live replay, and what they counted."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ....errors import RunError
from ... import processes
from ...router.peers import MODEL, free_port
from ..simulate import Setup
from .scale import Scale
from .waiting import until

_COUNTERS = {
    "vllm:prefix_cache_queries_total": "queried",
    "vllm:prefix_cache_hits_total": "hit",
    "vllm:num_preemptions_total": "preempted",
}
_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEngine:
    """Ports on loopback."""

    port: int
    events: int
    replay: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one engine counted, in live tokens."""

    queried: int = 0
    """Prompt tokens looked up in its cache, …"""
    hit: int = 0
    """… and those found."""
    preempted: int = 0
    """Requests that lost their blocks to others."""

    def __sub__(self, other: Counted) -> Counted:
        return Counted(
            queried=self.queried - other.queried,
            hit=self.hit - other.hit,
            preempted=self.preempted - other.preempted,
        )


@contextmanager
def engines(setup: Setup, scale: Scale, directory: Path, log: IO[bytes]) -> Iterator[Sequence[FakeEngine]]:
    """Fresh ones, ready to answer. Raises RunError when one does not come up."""
    with ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: processes.end(*started))
        ready: list[FakeEngine] = []
        for _ in range(_TRIES):
            new = []
            for _ in range(setup.workers - len(ready)):
                engine = FakeEngine(port=free_port(), events=free_port(), replay=free_port())
                process = processes.start(_command(engine, setup, scale), directory=directory, log=log)
                started.append(process)
                new.append((engine, process))
            ready += [engine for engine, process in new if _up(engine, process)]
            if len(ready) == setup.workers:
                break
        else:
            raise RunError("the fake engines do not start", hint="see the log of this run")
        yield ready


def _up(engine: FakeEngine, process: subprocess.Popen[bytes]) -> bool:
    """False when it ended: a port that was free a moment ago is somebody else's by now."""
    try:
        until(f"{engine.url}/health", process, what=f"the fake engine on port {engine.port}")
    except RunError:
        if process.poll() is None:
            raise
        return False
    return True


def counted(engine: FakeEngine) -> Counted:
    """From its /metrics, since its start."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{engine.url}/metrics", timeout=30.0) as answer:
        return parse(answer.read().decode())


def parse(metrics: str) -> Counted:
    """Of the text of an engine's /metrics."""
    found = dict.fromkeys(_COUNTERS.values(), 0)
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        counter = _COUNTERS.get(name.partition("{")[0])
        if counter is not None:
            found[counter] += int(float(value))
    return Counted(**found)


def _command(engine: FakeEngine, setup: Setup, scale: Scale) -> tuple[str, ...]:
    events = {
        "enable_kv_cache_events": True,
        "endpoint": f"tcp://127.0.0.1:{engine.events}",
        "replay_endpoint": f"tcp://127.0.0.1:{engine.replay}",
    }
    model = setup.engine
    return (
        sys.executable, "-m", "hpcserve.engines.fake_server", "--model", MODEL, "--port", str(engine.port),
        "--block-size", str(scale.block_tokens), "--kv-blocks", str(model.blocks),
        "--max-model-len", str(model.blocks * scale.block_tokens),
        "--max-num-batched-tokens", str(scale.step_tokens(model)),
        "--prefill-tokens-per-second", f"{scale.prefill_rate(model):g}",
        "--itl-ms", f"{1e3 * scale.step_base(model):g}",
        "--itl-ms-per-seq", f"{1e3 * scale.step_per_answer(model):g}",
        "--kv-events-config", json.dumps(events), "--enable-prompt-tokens-details",
    )  # fmt: skip
