"""The comparison as a table, and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Json = Mapping[str, Any]

COLUMNS = (
    ("chunk", "µs/chunk", 1e6, 1),
    ("stream", "µs/chunk of 512", 1e6, 1),
    ("short", "µs/short", 1e6, 0),
    ("long", "µs/12k words", 1e6, 0),
    ("ttft_1_p50", "+TTFT p50 (1) ms", 1e3, 2),
    ("ttft_1_p99", "p99", 1e3, 2),
    ("ttft_64_p50", "+TTFT p50 (64) ms", 1e3, 1),
    ("ttft_64_p99", "p99", 1e3, 1),
    ("rss", "MB/process", 1e-6, 0),
    ("errors", "errors", 1, 0),
)
_RATIOS = ("chunk", "stream", "short", "long", "ttft_1_p50", "rss")
BASES = ("nginx", "vllm-router round_robin", "vllm-router cache_aware", "vllm-router P/D")


def table(results: Mapping[str, Json | None]) -> str:
    """Figures of each router; None is one that is not installed. Then ratios to the usual ones."""
    rows = [["router", *(title for _, title, _, _ in COLUMNS)]]
    for name, found in results.items():
        if found is None:
            rows.append([name, "not installed"])
        elif "failed" in found:
            rows.append([name, f"failed: {found['failed']}"])
        else:
            rows.append(
                [name, *(_figure(found.get(key), scale, digits) for key, _, scale, digits in COLUMNS)]
            )
    text = [_aligned(rows)]
    ours = [name for name in results if name.startswith("hpcserve")]
    bases = [name for name in BASES if _good(results.get(name))]
    titles = {key: title for key, title, _, _ in COLUMNS}
    rows = [["ratio", *(titles[key] for key in _RATIOS)]]
    for name in ours:
        for base in bases:
            mine, other = results[name], results[base]
            if mine is not None and other is not None and _good(mine):
                rows.append([f"{name} / {base}", *(_ratio(mine.get(key), other.get(key)) for key in _RATIOS)])
    if len(rows) > 1:
        text.append(_aligned(rows))
    return "\n\n".join(text) + "\n"


def _good(found: Json | None) -> bool:
    return found is not None and "failed" not in found


def _figure(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def _ratio(mine: float | None, other: float | None) -> str:
    return "–" if mine is None or not other else f"{mine / other:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of figures to the right; a row with words instead of figures just has them."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    first = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] if row in full else row[1:]
        lines.append("  ".join([row[0].ljust(first), *cells]).rstrip())
    return "\n".join(lines)


_WIDTH, _LABEL, _BAR, _GAP = 860, 200, 16, 44
_PANELS = (
    ("chunk", "CPU per streamed chunk, µs", 1e6),
    ("stream", "CPU per streamed chunk of long answers, µs", 1e6),
    ("short", "CPU per short request, µs", 1e6),
    ("long", "CPU per prompt of 12,000 words, µs", 1e6),
    ("ttft_1_p50", "added TTFT p50, one connection, ms", 1e3),
    ("rss", "resident per process, MB", 1e-6),
)


def svg(results: Mapping[str, Json | None]) -> str:
    """One panel of bars per figure; ours are dark."""
    good = {name: found for name, found in results.items() if found is not None and _good(found)}
    parts: list[str] = []
    y = 10
    for key, title, scale in _PANELS:
        values = {name: found[key] * scale for name, found in good.items() if found.get(key) is not None}
        if not values:
            continue
        most = max(values.values()) or 1.0
        y += 24
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        for name, value in values.items():
            y += _BAR + 4
            width = max(1.0, value / most * (_WIDTH - _LABEL - 80))
            colour = "#1f3a5f" if name.startswith("hpcserve") else "#a9b7c6"
            parts.append(
                f'<text x="{_LABEL - 8}" y="{y}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{_LABEL}" y="{y - _BAR + 4}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'
                f'<text x="{_LABEL + width + 6:.1f}" y="{y}">{value:.4g}</text>'
            )
        y += _GAP - 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
