"""What a job had done at each moment, in a fixed number of points, for the plot of the report."""

from __future__ import annotations

import msgspec

MOST_POINTS = 240


class Point(msgspec.Struct, frozen=True, array_like=True):
    at: float
    """Unix seconds."""
    rows: int
    tokens: int
    """Of prompts and answers."""


class Course:
    """Evenly spaced points; the space doubles when there are too many."""

    def __init__(self, began: float) -> None:
        self.points = [Point(began, 0, 0)]
        self._space = 1.0

    def note(self, at: float, rows: int, tokens: int) -> None:
        """Called about once a second."""
        # Calls are a little early or late.
        if at - self.points[-1].at < self._space - 0.5:
            return
        self.points.append(Point(round(at, 2), rows, tokens))
        if len(self.points) > MOST_POINTS:
            self.points = self.points[::2]
            self._space *= 2
