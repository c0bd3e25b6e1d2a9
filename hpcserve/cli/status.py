"""Show how one run is doing: from its controller, or from its files when that does not answer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from .arguments import Parser, add_json, add_run
from .fabric import show
from .ladder import Progress, begin, duration, fold, rungs, with_joined
from .named import named_run, plan_of
from .output import print_json, table, warn

if TYPE_CHECKING:
    from ..control import Overview
    from ..rundir.runs import Run


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--fabric", action="store_true", help="show ports, NVLink and transport variables, with reasons"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..control import LIVE, overview

    run = named_run(args.run)
    if args.fabric:
        show(run, as_json=args.json)
        return 0
    [seen], outage = overview([run])
    if outage is not None:
        warn(outage.message, outage.hint)
    status = _ask(run) if seen.state in LIVE and seen.state != "queued" else None
    if args.json:
        print_json(_document(seen, status))
        return 0
    print(_headline(seen))
    progress = _progress(seen)
    for rung in _ladder(seen, progress):
        print(f"  {rung}")
    for message, hint in progress.warnings:
        warn(message, hint)
    replicas = status.get("replicas") if status else None
    if replicas:
        print(_replicas(replicas, (status or {}).get("workers") or ()))
    batch = _batch(run)
    if batch is not None:
        from ..batch.progress import line

        print(f"batch: {line(batch)}")
    router = status.get("router") if status else None
    if router:
        print(
            f"requests: {router.get('requests', 0)} so far, {router.get('in_flight', 0)} running, "
            f"{router.get('errors', 0)} failed"
        )
    if seen.state == "ready":
        print(f"reach it with: hpcserve connect {run.record.run_id}")
    elif seen.state in ("failed", "ended"):
        print(f"its logs: hpcserve logs {run.record.run_id}")
    print(f"run directory: {run.directory.path}")
    return 0


def _ask(run: Run) -> Mapping[str, Any] | None:
    """The controller's own account; None, and a warning, when only the files can tell."""
    from ..control import Controller

    if not run.directory.head.exists():
        return None
    try:
        return Controller(run).status()
    except RunError as error:
        warn(f"{error.message}; this is what the run directory says", error.hint)
        return None


def _batch(run: Run) -> Any:
    """How far the batch is that the run is for, as one of its jobs wrote it last; None without one."""
    from ..batch.layout import BatchDir
    from ..rundir.atomic import read_json

    batch = plan_of(run).batch
    if batch is None:
        return None
    try:
        return read_json(BatchDir(Path(batch.output)).status)
    except FileNotFoundError:
        return None


def _headline(seen: Overview) -> str:
    record = seen.run.record
    job = f"job {record.job_id}" if record.job_id else "no job"
    left = f", {duration(seen.end - time.time())} left" if seen.end else ""
    detail = f": {seen.detail}" if seen.detail else ""
    return f"{record.run_id} ({job} at {record.site}{left}) is {seen.state}{detail}"


def _progress(seen: Overview) -> Progress:
    from ..control import events
    from .live import joined

    run = seen.run
    progress = begin(plan_of(run), run.record.created)
    progress = fold(progress, events(run))
    return with_joined(progress, joined(run), time.time())


def _ladder(seen: Overview, progress: Progress) -> list[str]:
    """The rungs reached so far, with the time each took since the launch."""
    lines = []
    for rung in rungs(progress, time.time()):
        if rung.state == "ahead" or (rung.state == "now" and not rung.text):
            continue
        since = "" if rung.at is None else duration(rung.at - seen.run.record.created)
        lines.append(f"{since:>8}  {rung.name}{f': {rung.text}' if rung.text else ''}")
    return lines


def _replicas(replicas: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]) -> str:
    busy: dict[str, list[int]] = {}
    for worker in workers:
        # A replica whose ranks the router chooses is several workers, in the order of the ranks.
        busy.setdefault(str(worker.get("replica")), []).append(int(worker.get("in_flight") or 0))
    rows = []
    coming = any(not replica.get("in_rotation") for replica in replicas)
    for replica in replicas:
        waiting = None if replica.get("in_rotation") else replica.get("progress") or replica.get("reason")
        name = str(replica.get("name"))
        in_flight = busy.get(name)
        rows.append(
            (
                name,
                str(replica.get("state")),
                str(replica.get("node") or ""),
                "-" if in_flight is None else _by_rank(in_flight),
                str(replica.get("restarts", 0)),
                str(replica.get("url") or "-"),
                *([str(waiting or "")] if coming else []),
            )
        )
    header = ("REPLICA", "STATE", "NODE", "IN FLIGHT", "RESTARTS", "URL", *(["PROGRESS"] if coming else []))
    return table(header, rows)


def _by_rank(in_flight: Sequence[int]) -> str:
    """`7`; for a replica of several workers `7 = 3 + 2×2 + 0`, in the order of its ranks."""
    if len(in_flight) == 1:
        return str(in_flight[0])
    runs = [(count, len(list(same))) for count, same in groupby(in_flight)]
    parts = [f"{times}×{count}" if times > 1 else str(count) for count, times in runs]
    return f"{sum(in_flight)} = {' + '.join(parts)}"


def _document(seen: Overview, status: Mapping[str, Any] | None) -> dict[str, Any]:
    from ..control import events

    record = seen.run.record
    job = seen.job
    return {
        "name": record.run_id,
        "state": seen.state,
        "detail": seen.detail,
        "site": record.site,
        "scheduler": record.scheduler,
        "job": None
        if job is None
        else {"id": job.job_id, "state": job.state, "reason": job.reason, "nodes": list(job.nodes)},
        "end_time": seen.end,
        "directory": str(seen.run.directory.path),
        "source": "files" if status is None else "controller",
        "controller": status,
        "batch": _batch(seen.run),
        "events": events(seen.run),
    }
