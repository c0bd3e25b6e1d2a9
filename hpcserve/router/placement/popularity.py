"""How often beginnings of prompts came back of late: a copy of a popular one is soon paid off."""

from __future__ import annotations

from collections import OrderedDict
from math import exp

_MEMORY = 30.0
"""Seconds over which uses are forgotten."""
_MOST = 8192
"""Beginnings remembered; those unused for longest go."""


class Popularity:
    """Times are the event loop's."""

    def __init__(self) -> None:
        self._uses: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def used(self, chunk: int, now: float) -> float:
        """A prompt was found cached up to `chunk`. Returns how often it was before."""
        uses = self._uses
        found = uses.get(chunk)
        if found is None:
            uses[chunk] = 1.0, now
            if len(uses) > _MOST:
                uses.popitem(last=False)
            return 0.0
        before = found[0] * exp((found[1] - now) / _MEMORY)
        uses[chunk] = before + 1.0, now
        uses.move_to_end(chunk)
        return before

    def of(self, chunk: int, now: float) -> float:
        """Uses, each weighing less as it ages."""
        found = self._uses.get(chunk)
        return found[0] * exp((found[1] - now) / _MEMORY) if found else 0.0
