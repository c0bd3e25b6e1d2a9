"""List your runs, newest first."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from ..errors import StorageError
from .arguments import Parser, add_json
from .ladder import duration
from .named import known_runs
from .output import print_json, say, table, warn

if TYPE_CHECKING:
    from ..control import Overview


def add_arguments(parser: Parser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..control import overview

    runs, roots = known_runs()
    found, outage = overview(runs)
    if outage is not None:
        warn(outage.message, outage.hint)
    rows = [_row(seen) for seen in found]
    if args.json:
        print_json({"runs": rows})
        return 0
    if not rows:
        say(f"no runs in {', '.join(map(str, roots)) or 'any known site'}")
        say("begin with: hpcserve launch --nodes 2 model.yaml")
        return 0
    now = time.time()
    header = ("NAME", "SITE", "JOB", "NODES", "MODEL", "STATE", "LEFT", "DETAIL")
    cells = [
        (
            row["name"],
            row["site"],
            row["job_id"] or "-",
            str(row["nodes"] or "?"),
            row["model"] or "?",
            row["state"],
            duration(row["end_time"] - now) if row["end_time"] else "-",
            row["detail"][:60],
        )
        for row in rows
    ]
    print(table(header, cells))
    return 0


def _row(seen: Overview) -> dict[str, Any]:
    from ..rundir.atomic import read_json

    record = seen.run.record
    try:
        plan = read_json(seen.run.directory.plan)
    except (FileNotFoundError, StorageError):  # the rest of the line, with its `?`, is still worth showing
        plan = {}
    plan = plan if isinstance(plan, dict) else {}
    return {
        "name": record.run_id,
        "site": record.site,
        "scheduler": record.scheduler,
        "job_id": record.job_id,
        "nodes": plan.get("nodes"),
        "model": plan.get("served_name"),
        "state": seen.state,
        "detail": seen.detail,
        "end_time": seen.end,
        "created": record.created,
        "directory": str(seen.run.directory.path),
    }
