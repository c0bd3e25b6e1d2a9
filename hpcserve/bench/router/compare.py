"""Every router in turn, several times over, and the best of each figure."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import RunError, UsageError
from .measure import Generator, direct, engines, measure
from .peers import PEERS, Peer, find

Json = dict[str, Any]
_GAP = 0.005
_NOT_MINIMA = frozenset({"errors", "closed", "rss", "rss_all", "processes"})


def compare(
    *, directory: Path | None, only: Sequence[str], rounds: int, log: Path, say: Callable[[str], None]
) -> Json:
    """`routers`: name -> figures, None where it is not installed. Seconds and bytes.

    Each round runs every router once, and each figure is the least of all rounds: whatever else the
    machine does only adds. Times to first token are less those of the engines alone. Raises UsageError.
    """
    chosen = _chosen(only)
    found: dict[str, Json | None] = {}
    plain: Json = {}
    generator = Generator()
    try:
        with engines(2, _GAP) as ports:
            for number in range(rounds):
                plain = _best(plain, direct(ports, generator))
                for peer in chosen:
                    executable = find(peer.program, directory)
                    if executable is None:
                        found[peer.name] = None
                        continue
                    say(f"round {number + 1}/{rounds}: {peer.name}")
                    try:
                        new = measure(peer, executable, directory, ports, generator, log)
                    except RunError as error:
                        new = {"failed": error.message}
                    found[peer.name] = _best(found.get(peer.name) or {}, new)
    finally:
        generator.close()
    for figures in found.values():
        for key, alone in plain.items():
            if figures is not None and figures.get(key) is not None:
                figures[key] -= alone
    machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    return {"machine": machine, "rounds": rounds, "direct": plain, "routers": found}


def _chosen(only: Sequence[str]) -> list[Peer]:
    names = [peer.name for peer in PEERS]
    for name in only:
        if name not in names:
            raise UsageError(f"no router is called {name!r} here", hint=f"there are: {', '.join(names)}")
    return [peer for peer in PEERS if not only or peer.name in only]


def _best(before: Json, new: Json) -> Json:
    if not before or "failed" in before:
        return new
    if "failed" in new:
        return before
    merged = dict(new)
    for key, value in before.items():
        other = new.get(key)
        if value is None or other is None:
            merged[key] = value if other is None else other
        elif key in ("errors", "closed"):
            merged[key] = value + other
        else:
            merged[key] = max(value, other) if key in _NOT_MINIMA else min(value, other)
    return merged
