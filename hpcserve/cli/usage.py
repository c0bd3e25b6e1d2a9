"""Print what was used: tokens, and GPU-hours shared out between those who used them.

GPU-hours while no request ran are idle, and nobody's. The others are shared out hour by hour: a prompt
token that was computed counts 1, one from the prefix cache 0, one that was written 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .arguments import Parser, add_json
from .output import print_json, say, table, warn

if TYPE_CHECKING:
    from ..router.keys.report import Report
    from ..router.keys.usage_file import RunUsage

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_DATES = ("%Y-%m-%d", "%Y-%m-%dT%H:%M")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="leave out earlier hours: a date such as 2026-03-01, or an age such as 7d",
    )
    parser.add_argument(
        "--by",
        choices=("user", "key", "model", "run"),
        default="user",
        help="what a line is about (default: user)",
    )
    parser.add_argument(
        "--usage",
        type=Path,
        metavar="DIR",
        help="directory of usage (default: .usage in all runs directories)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..router.keys.report import report

    since = None if args.since is None else _since(args.since, time.time())
    runs, directories = _read(args.usage)
    found = report(runs, by=args.by, since=since)
    if args.json:
        rows = [dataclasses.asdict(row) for row in found.rows]
        print_json({"by": args.by, "since": since, "rows": rows, "idle_gpu_hours": found.idle_gpu_hours})
        return 0
    if not runs:
        say(f"nothing was used yet, says {', '.join(map(str, directories)) or 'no runs directory'}")
        return 0
    print(_table(args.by, found))
    return 0


def _since(text: str, now: float) -> float:
    age = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if age:
        return now - int(age[1]) * _UNITS[age[2]]
    for form in _DATES:
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    raise UsageError(
        f"--since {text!r} is neither a date nor an age",
        hint="write 2026-03-01, 2026-03-01T14:00, or 90m, 12h, 7d, 2w",
    )


def _read(directory: Path | None) -> tuple[dict[str, RunUsage], list[Path]]:
    from ..launch import known_roots
    from ..router.keys.usage_file import read_all
    from ..rundir.layout import USAGE

    if directory is not None:
        directories = [directory]
    else:
        roots, errors = known_roots(os.environ)
        for error in errors:
            warn(error.message, error.hint)
        directories = [root / USAGE for root in roots]
    runs: dict[str, RunUsage] = {}
    for place in directories:
        found, warnings = read_all(place)
        for warning in warnings:
            warn(warning)
        # Runs of one name in two runs directories are two runs.
        for name, usage in found.items():
            runs[name if name not in runs else f"{place.parent}/{name}"] = usage
    return runs, directories


def _table(by: str, found: Report) -> str:
    header = (by.upper(), "REQUESTS", "PROMPT", "CACHED", "WRITTEN", "GPU-HOURS")
    cells = [
        (
            row.name,
            f"{row.requests:,}",
            f"{row.prompt_tokens:,}",
            f"{row.cached_tokens:,}",
            f"{row.completion_tokens:,}",
            f"{row.gpu_hours:.2f}",
        )
        for row in found.rows
    ]
    cells.append(("(idle)", "", "", "", "", f"{found.idle_gpu_hours:.2f}"))
    return table(header, cells)
