"""How much runs at once: a budget of tokens, steered by what the engines say of themselves.

An engine is at its best while a few requests wait for room in it: fewer, and slots run empty; many more, and
nothing is gained while all that runs gets slower or, with vLLM, is thrown out and computed again. So the
budget grows while an engine of every role has nobody waiting, quickly until the first one waits and slowly
after that, and shrinks where a queue forms. In P/D it is enough that one of the pools is busy: the other
can't be fuller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_FIRST_ROWS = 16
"""Per worker, before anything was measured."""
_FAST, _SLOW, _BACK = 1.5, 1.05, 0.9
_QUEUE = 0.25
"""Part of those that run which may wait before the budget shrinks, and at the least _FEW."""
_FEW = 8


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine, at one moment."""

    role: str
    running: float
    waiting: float


def parse(metrics: str) -> tuple[list[EngineLoad], float]:
    """The engines, and the requests that wait in the router, from the text of its /metrics."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    queued = 0.0
    for line in metrics.splitlines():
        if line.startswith("hpcserve_router_queued "):
            queued = float(line.rpartition(" ")[2])
        elif line.startswith(("hpcserve_router_engine_running{", "hpcserve_router_engine_waiting{")):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            pairs = dict(pair.split("=", 1) for pair in labels.split(",") if "=" in pair)
            key = (pairs.get("worker", ""), pairs.get("role", "").strip('"'))
            found[key][name.rpartition("_")[2]] = float(value)
    loads = [
        EngineLoad(role, values.get("running", 0.0), values.get("waiting", 0.0))
        for (_, role), values in found.items()
    ]
    return loads, queued


class Budget:
    """Tokens in flight: prompts, and the answers that are expected."""

    def __init__(self) -> None:
        self.limit: float | None = None
        """None: nothing is known yet."""
        self.held = 0.0
        self.rows = 0
        self._grows_fast = True
        self._held_back = False
        """A row did not fit since the last steer(): a larger budget would be used."""
        self._was_cut = False

    def fits(self, tokens: float, workers: int) -> bool:
        """May a row of so many tokens begin now?"""
        if not self.rows:
            return True
        if self.limit is None:
            fits = self.rows < _FIRST_ROWS * max(1, workers)
        else:
            fits = self.held + tokens <= self.limit
        self._held_back |= not fits
        return fits

    def enter(self, tokens: float) -> None:
        self.held += tokens
        self.rows += 1

    def leave(self, tokens: float) -> None:
        self.held -= tokens
        self.rows -= 1

    def steer(self, engines: Iterable[EngineLoad], queued: float) -> None:
        """Once a second: what the engines say, and how many requests wait in the router."""
        held_back, self._held_back, self._was_cut = self._held_back, False, False
        by_role: dict[str, list[EngineLoad]] = defaultdict(list)
        for engine in engines:
            by_role[engine.role].append(engine)
        if not by_role:
            return
        if self.limit is None:
            self.limit = self.held
        hungry = queued < 1 and all(min(engine.waiting for engine in pool) < 1 for pool in by_role.values())
        waiting = queued + sum(engine.waiting for pool in by_role.values() for engine in pool)
        running = sum(engine.running for pool in by_role.values() for engine in pool)
        count = sum(map(len, by_role.values()))
        if hungry:
            if held_back:
                self.limit *= _FAST if self._grows_fast else _SLOW
            return
        self._grows_fast = False
        # While more is in flight than the limit, the last cut has not worked yet: slow engines would be cut
        # to nothing before their first answer.
        if waiting > max(_QUEUE * running, _FEW * count) and self.held <= self.limit:
            self.limit = max(_BACK * min(self.limit, self.held), 1.0)

    def cut(self) -> None:
        """The endpoint refused a request for want of room. Of many that it refused at once, one counts."""
        self._grows_fast = False
        if self.limit is not None and not self._was_cut:
            self._was_cut = True
            self.limit = max(_BACK * min(self.limit, self.held), 1.0)
