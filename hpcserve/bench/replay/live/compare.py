"""One router after the other on the same trace, each before fresh engines, and the simulation beside them."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import uvloop

from ....errors import RunError, UsageError
from ... import processes
from ...router.cost import cpu_seconds
from ...router.peers import find, free_port
from .. import bounds
from ..compare import POLICIES
from ..outcome import measure
from ..simulate import Setup
from ..simulate import play as simulate
from ..trace import BLOCK_TOKENS, TraceRequest
from .figures import figures
from .fleet import counted, engines
from .player import play
from .routers import ROUTERS, Front, LiveRouter
from .scale import Scale
from .waiting import until_it_answers

Json = dict[str, Any]
_PATIENCE = 60.0
"""Seconds after the last request in which answers are still awaited."""
_DYNAMO = {"nvext": {"extra_fields": ["worker_id"]}}
"""Asks its frontend to say which engine answered."""


def compare(
    trace: Sequence[TraceRequest],
    setup: Setup,
    scale: Scale,
    *,
    directory: Path | None = None,
    only: Sequence[str] = (),
    log: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Json:
    """The JSON document; `routers`: name -> figures, None where it is not installed. Raises UsageError."""
    chosen = _chosen(only)
    found: dict[str, Json | None] = {}
    with log.open("ab") as file:
        for router in chosen:
            executable = find(router.program, directory)
            if executable is None:
                say(f"{router.name}: not installed")
                found[router.name] = None
                continue
            say(f"{router.name}: about {scale.arrival(trace[-1]):.0f} s")
            try:
                found[router.name] = _measure(router, executable, trace, setup, scale, file)
            except RunError as error:
                found[router.name] = {"failed": error.message}
    blocks = setup.workers * setup.engine.blocks
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "setup": {**asdict(setup), "scale": asdict(scale), "block_tokens": BLOCK_TOKENS},
        "trace": {"requests": len(trace), "seconds": trace[-1].arrival - trace[0].arrival},
        "routers": found,
        "simulated": _simulated(trace, setup, chosen),
        "bounds": {
            "one shared cache": bounds.shared(trace, blocks),
            "one shared cache with foresight": bounds.foresight(trace, blocks),
            "nothing evicted": bounds.unlimited(trace),
        },
    }


def _chosen(only: Sequence[str]) -> list[LiveRouter]:
    names = [router.name for router in ROUTERS]
    for name in only:
        if name not in names:
            raise UsageError(f"no router is called {name!r} here", hint=f"there are: {', '.join(names)}")
    return [router for router in ROUTERS if not only or router.name in only]


def _simulated(trace: Sequence[TraceRequest], setup: Setup, chosen: Sequence[LiveRouter]) -> Json:
    """Router's name -> the figures of the policy that stands for it in the simulation."""
    found: Json = {}
    for router in chosen:
        if router.simulated is not None:
            outcome = measure(simulate(trace, POLICIES[router.simulated](setup), setup))
            found[router.name] = {"policy": router.simulated, **asdict(outcome)}
    return found


def _measure(
    router: LiveRouter,
    executable: str,
    trace: Sequence[TraceRequest],
    setup: Setup,
    scale: Scale,
    log: IO[bytes],
) -> Json:
    with tempfile.TemporaryDirectory(prefix="hpcserve-replay-") as name:
        directory = Path(name)
        front = Front(
            executable=executable,
            directory=directory,
            port=free_port(),
            engines=(),
            setup=setup,
            scale=scale,
        )
        if router.own_engines:
            return _run(router, front, trace, log)
        with engines(setup, scale, directory, log) as fleet:
            return _run(router, replace(front, engines=fleet), trace, log)


def _run(router: LiveRouter, front: Front, trace: Sequence[TraceRequest], log: IO[bytes]) -> Json:
    """Raises RunError when the router does not come up."""
    command = router.command(front)
    started = []
    try:
        for argv in (*command.beside, command.argv):
            started.append(processes.start(argv, directory=front.directory, log=log, env=command.env))
        url = f"http://127.0.0.1:{front.port}"
        until_it_answers(url, started[-1], what=router.name)
        before = [counted(engine) for engine in front.engines]
        began, busy, own = time.monotonic(), _busy_seconds(), cpu_seconds(os.getpid())
        routers = cpu_seconds(started[-1].pid)
        extra: dict[str, object] = dict(_DYNAMO) if router.own_engines else {}
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            answers = runner.run(play(trace, url, front.scale, patience=_PATIENCE, extra=extra))
        seconds = time.monotonic() - began
        available = seconds * (os.cpu_count() or 1)
        busy, own = (_busy_seconds() - busy) / available, (cpu_seconds(os.getpid()) - own) / available
        routers = cpu_seconds(started[-1].pid) - routers
        counts = [counted(engine) - old for engine, old in zip(front.engines, before, strict=True)]
    finally:
        processes.end(*reversed(started))
    outcome = figures(answers, front.scale, None if router.own_engines else counts, front.setup.workers)
    return {
        **asdict(outcome),
        "seconds": round(seconds, 1),
        "machine_busy": round(busy, 3),
        "own_share": round(own, 3),
        "router_cpu": round(routers / len(trace), 6),
    }


def _busy_seconds() -> float:
    """CPU seconds this machine has worked since it came up, for anybody."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")
