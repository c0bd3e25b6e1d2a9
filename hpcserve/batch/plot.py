"""The report's picture: tokens a second of each job over time, on bands for what its GPU-hours went into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .history import PHASES, Part

_WIDTH, _HEIGHT = 900, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 40, 40
_COLOURS = {"load": "#e6e6e6", "steady": "#dcebdc", "tail": "#f6edcf", "drain": "#f3dcdc"}
_TICKS = 5


def svg(parts: Sequence[Part]) -> str:
    """`parts` are not none. Times are hours since the first job began."""
    start = min(part.job_began for part in parts)
    span = max(max(part.ended for part in parts) - start, 1e-9)
    lines = [list(_rates(part)) for part in parts]
    most = max((rate for line in lines for _, rate in line), default=0.0) or 1.0

    def x(at: float) -> float:
        return _LEFT + (at - start) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(rate: float) -> float:
        return _HEIGHT - _BOTTOM - rate / most * (_HEIGHT - _TOP - _BOTTOM)

    shapes: list[str] = []
    for part in parts:
        edges = part.edges
        for name, left, right in zip(PHASES, edges, edges[1:], strict=False):
            if right > left:
                shapes.append(
                    f'<rect x="{x(left):.1f}" y="{_TOP}" width="{x(right) - x(left):.1f}"'
                    f' height="{_HEIGHT - _TOP - _BOTTOM}" fill="{_COLOURS[name]}" fill-opacity="0.7"/>'
                )
    for part, line in zip(parts, lines, strict=True):
        path = " ".join(f"{x(at):.1f},{y(rate):.1f}" for at, rate in line)
        shapes.append(
            f'<polyline points="{path}" fill="none" stroke="#1f3a5f" stroke-width="1.5">'
            f"<title>{escape(part.member)}</title></polyline>"
        )
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        shapes += [
            f'<text x="{_LEFT - 6}" y="{y(share * most) + 4:.1f}" text-anchor="end">{share * most:,.0f}'
            "</text>",
            f'<text x="{x(start + share * span):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{share * span / 3600:.3g}</text>",
        ]
    legend = _LEFT
    for name in PHASES:
        shapes.append(
            f'<rect x="{legend}" y="12" width="12" height="12" fill="{_COLOURS[name]}"/>'
            f'<text x="{legend + 18}" y="22">{name}</text>'
        )
        legend += 80
    shapes.append(f'<text x="{legend}" y="22">tokens/s, prompts and answers, over hours</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-size="12"'
        f' font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>{"".join(shapes)}</svg>\n'
    )


def _rates(part: Part) -> Iterator[tuple[float, float]]:
    """Middle of each interval, and its tokens a second."""
    for before, after in zip(part.course, part.course[1:], strict=False):
        seconds = after.at - before.at
        if seconds > 0:
            yield (before.at + after.at) / 2, (after.tokens - before.tokens) / seconds
