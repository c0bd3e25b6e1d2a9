"""What a batch cost: GPU-hours by what they went into, and what they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from . import disk
from .history import Part
from .layout import BatchDir
from .manifest import Manifest
from .merge import Merged


def make_report(manifest: Manifest, merged: Merged, parts: Sequence[Part]) -> dict[str, Any]:
    """As plain data, for report.json."""
    hours = {name: sum(_phases(part)[name] for part in parts) for name in _PHASES}
    total = sum(hours.values())
    prompt = sum(part.prompt_tokens for part in parts)
    output = sum(part.output_tokens for part in parts)
    seconds = sum(part.ended - part.began for part in parts)
    return {
        "rows": manifest.rows,
        "results": merged.items,
        "errors": merged.failed,
        "computed_more_than_once": merged.results - merged.items,
        "jobs": len(parts),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "driver_seconds": round(seconds, 1),
        "rows_per_second": _per(merged.items, seconds),
        "output_tokens_per_second": _per(output, seconds),
        "gpu_hours": {**{name: round(value, 4) for name, value in hours.items()}, "total": round(total, 4)},
        "gpu_hours_per_million_output_tokens": _per(1e6 * total, output),
        "gpu_hours_per_million_tokens": _per(1e6 * total, prompt + output),
        "rows_per_gpu_hour": _per(merged.items, total),
        "attempts": _summed(part.attempts for part in parts),
        "finish_reasons": _summed(part.finish_reasons for part in parts),
        "retries": _summed(part.retries for part in parts),
    }


_PHASES = ("load", "steady", "tail", "drain")


def _phases(part: Part) -> dict[str, float]:
    """GPU-hours of one job: until its driver began, until there was no row left to begin with, until the last
    result, and until its driver's end."""
    tail = part.tail if part.tail is not None else part.last_result or part.ended
    last = max(part.last_result or part.ended, tail)
    edges = (part.job_began, part.began, tail, last, part.ended)
    return {
        name: part.gpus * max(0.0, end - start) / 3600
        for name, start, end in zip(_PHASES, edges, edges[1:], strict=False)
    }


def _per(amount: float, of: float) -> float | None:
    return round(amount / of, 4) if of else None


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def write_report(directory: BatchDir, report: dict[str, Any]) -> None:
    """report.json and report.txt. Raises StorageError."""
    disk.write_whole(directory.report, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    disk.write_whole(directory.report_text, text(report).encode())


def text(report: dict[str, Any]) -> str:
    """For people."""
    hours = report["gpu_hours"]
    lines = [
        f"rows            {report['rows']:,}",
        f"results         {report['results']:,}, {report['errors']:,} of them errors",
        f"tokens          {report['prompt_tokens']:,} prompt, {report['output_tokens']:,} output",
        f"jobs            {report['jobs']}, {report['driver_seconds']:,.0f} s of work",
    ]
    if report["rows_per_second"] is not None:
        lines.append(
            f"rate            {report['rows_per_second']:,.1f} rows/s,"
            f" {report['output_tokens_per_second']:,.0f} output tokens/s"
        )
    if hours["total"]:
        split = ", ".join(f"{name} {hours[name]:.2f}" for name in _PHASES)
        lines.append(f"GPU-hours       {hours['total']:.2f}: {split}")
        if report["gpu_hours_per_million_output_tokens"] is not None:
            lines.append(
                f"{'':<15} {report['gpu_hours_per_million_output_tokens']:.3f} per million output tokens,"
                f" {report['gpu_hours_per_million_tokens']:.3f} per million tokens,"
                f" {report['rows_per_gpu_hour']:,.0f} rows per GPU-hour"
            )
    again = report["computed_more_than_once"]
    lines.append(f"computed again  {again:,} rows ({again / max(1, report['results']):.1%})")
    for name in ("attempts", "finish_reasons", "retries"):
        if report[name]:
            counts = ", ".join(f"{key}: {value:,}" for key, value in report[name].items())
            lines.append(f"{name.replace('_', ' '):<15} {counts}")
    return "\n".join(lines) + "\n"
