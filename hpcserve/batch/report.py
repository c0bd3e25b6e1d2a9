"""What a batch cost: GPU-hours by what they went into, and what they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from . import disk, plot, pools
from .history import PHASES, Part
from .layout import BatchDir
from .manifest import Manifest
from .merge import Merged


def make_report(manifest: Manifest, merged: Merged, parts: Sequence[Part]) -> dict[str, Any]:
    """As plain data, for report.json."""
    hours = {name: sum(_phases(part)[name] for part in parts) for name in PHASES}
    total = sum(hours.values())
    prompt = sum(part.prompt_tokens for part in parts)
    output = sum(part.output_tokens for part in parts)
    seconds = sum(part.ended - part.began for part in parts)
    results = sum(part.results for part in parts)
    used = pools.together(part.pools for part in parts)
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
        "service_units": _units(parts),
        "pools": {role: _pool(use) for role, use in sorted(used.items())},
        "advice": pools.advice(used),
        "driver_cpu_ms_per_row": _per(1e3 * sum(part.cpu_seconds for part in parts), results),
        "attempts": _summed(part.attempts for part in parts),
        "finish_reasons": _summed(part.finish_reasons for part in parts),
        "retries": _summed(part.retries for part in parts),
    }


def _phases(part: Part) -> dict[str, float]:
    """GPU-hours of one job."""
    edges = part.edges
    return {
        name: part.gpus * max(0.0, end - start) / 3600
        for name, start, end in zip(PHASES, edges, edges[1:], strict=False)
    }


def _units(parts: Sequence[Part]) -> float | None:
    """What the sites charge for it; None where one of them does not say."""
    total = 0.0
    for part in parts:
        if part.gpus and part.units_per_gpu_hour is None:
            return None
        total += sum(_phases(part).values()) * (part.units_per_gpu_hour or 0.0)
    return round(total, 2) if total else None


def _pool(use: pools.Use) -> dict[str, float]:
    return {
        "idle": round(use.part(use.idle), 3),
        "full": round(use.part(use.full), 3),
        "running_per_engine": round(use.part(use.running), 1),
    }


def _per(amount: float, of: float) -> float | None:
    return round(amount / of, 4) if of else None


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def write_report(directory: BatchDir, report: dict[str, Any], parts: Sequence[Part]) -> None:
    """report.svg, report.json and report.txt. Raises StorageError."""
    if parts:
        disk.write_whole(directory.report_plot, plot.svg(parts).encode())
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
        split = ", ".join(f"{name} {hours[name]:.2f}" for name in PHASES)
        lines.append(f"GPU-hours       {hours['total']:.2f}: {split}")
        if report["gpu_hours_per_million_output_tokens"] is not None:
            lines.append(
                f"{'':<15} {report['gpu_hours_per_million_output_tokens']:.3f} per million output tokens,"
                f" {report['gpu_hours_per_million_tokens']:.3f} per million tokens,"
                f" {report['rows_per_gpu_hour']:,.0f} rows per GPU-hour"
            )
    if report["service_units"] is not None:
        lines.append(f"service units   {report['service_units']:,.1f}")
    for role, use in report["pools"].items():
        lines.append(
            f"{role:<15} {use['running_per_engine']:,.1f} requests running on an engine,"
            f" {use['full']:.0%} of the time full, {use['idle']:.0%} idle"
        )
    if report["advice"] is not None:
        lines.append(f"advice          {report['advice']}")
    if report["driver_cpu_ms_per_row"] is not None:
        lines.append(f"driver          {report['driver_cpu_ms_per_row']:.2f} ms of CPU time a row")
    again = report["computed_more_than_once"]
    lines.append(f"computed again  {again:,} rows ({again / max(1, report['results']):.1%})")
    for name in ("attempts", "finish_reasons", "retries"):
        if report[name]:
            counts = ", ".join(f"{key}: {value:,}" for key, value in report[name].items())
            lines.append(f"{name.replace('_', ' '):<15} {counts}")
    return "\n".join(lines) + "\n"
