"""How busy the engines were while there were rows for all of them, and what that says of the job's layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from .admission import EngineLoad

_ENOUGH = 30
"""Samples of an engine that allow advice."""
_OFTEN = 0.5
"""Part of the time from which on a pool counts as kept full, or as mostly idle."""


class Use(msgspec.Struct):
    """Of one pool. An engine is sampled once a second."""

    samples: int = 0
    idle: int = 0
    """Those with no request running on the engine."""
    full: int = 0
    """Those with somebody waiting for room on it: it could not have done more."""
    running: float = 0.0
    """Sum of the requests that ran."""

    def part(self, count: float) -> float:
        """`count` per sample."""
        return count / self.samples if self.samples else 0.0


def look(pools: dict[str, Use], engines: Iterable[EngineLoad]) -> None:
    """Add one sample of each engine."""
    for engine in engines:
        use = pools.setdefault(engine.role, Use())
        use.samples += 1
        use.idle += engine.running < 1 and engine.waiting < 1
        use.full += engine.waiting >= 1
        use.running += engine.running


def together(parts: Iterable[Mapping[str, Use]]) -> dict[str, Use]:
    """The pools of several jobs, added up."""
    total: dict[str, Use] = {}
    for part in parts:
        for role, use in part.items():
            sum_ = total.setdefault(role, Use())
            sum_.samples += use.samples
            sum_.idle += use.idle
            sum_.full += use.full
            sum_.running += use.running
    return total


def advice(pools: Mapping[str, Use]) -> str | None:
    """What to change about the layout for the next batch like this one. None: nothing, or too little is
    known."""
    if not pools or any(use.samples < _ENOUGH for use in pools.values()):
        return None
    full = {role for role, use in pools.items() if use.part(use.full) >= _OFTEN}
    idle = {role for role, use in pools.items() if use.part(use.idle) >= _OFTEN}
    if not full:
        return "no pool was kept full: fewer nodes would answer these rows in about the same time"
    for narrow, wide in (("prefill", "decode"), ("decode", "prefill")):
        if narrow in full and wide in idle:
            share = pools[wide].part(pools[wide].idle)
            return (
                f"{narrow} was the narrow place, and {wide} was idle {share:.0%} of the time:"
                f" give a node of --{wide} to --{narrow}"
            )
    return None
