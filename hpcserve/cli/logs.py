"""Print the logs of a run, every line with its origin; with -f, go on as they grow."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from ..errors import RunError
from ..rundir.atomic import read_json
from ..rundir.logs import LogFile, Tail, Wanted, interleave, log_files
from ..rundir.runs import Run
from .arguments import Parser, add_run
from .named import named_run, plan_of

_ROLES = (
    "prefill", "decode", "aggregated", "head", "router", "agent", "rendezvous", "preflight", "staging", "job",
)  # fmt: skip
Show = Callable[[LogFile, str], None]

_LAST_LINES = 10
_GLANCE = 0.3
_ENDED_EVERY = 10.0
"""Seconds between two questions whether the job is over."""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the run ends")
    parser.add_argument("--role", choices=_ROLES, help="only these engines, or this program")
    parser.add_argument("--rank", type=int, metavar="N", help="only this rank's programs and engines")
    parser.add_argument("--replica", metavar="NAME", help="only this engine, such as decode-0")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line of the logs")


def run(args: argparse.Namespace) -> int:
    run = named_run(args.run)
    wanted = _wanted(run, args)
    if args.follow:
        _follow(run, wanted, _json if args.json else _prefixed(14))
        return 0
    files = log_files(run.directory.logs, wanted)
    if not files:
        raise RunError(
            f"run {run.record.run_id} has no such logs (yet)",
            hint=f"its log files are in {run.directory.logs}",
        )
    show = _json if args.json else _prefixed(max(len(file.label) for file in files))
    for file, line in interleave(files, time.localtime().tm_year):
        show(file, line)
    return 0


def _prefixed(width: int) -> Show:
    def show(file: LogFile, line: str) -> None:
        sys.stdout.write(f"{file.label:<{width}} | {line}\n")

    return show


def _json(file: LogFile, line: str) -> None:
    whose = {"role": file.role, "rank": file.rank, "replica": file.replica, "node": file.node}
    sys.stdout.write(json.dumps({"log": file.label, **whose, "line": line}) + "\n")


def _wanted(run: Run, args: argparse.Namespace) -> Wanted:
    wanted = Wanted(role=args.role, replica=args.replica, rank=args.rank)
    if args.rank is None:
        return wanted
    try:
        node = str(read_json(run.directory.rank(args.rank)).get("node"))
    except FileNotFoundError:  # it has not joined; its engines have no logs yet
        node = None
    replicas = tuple(replica.name for replica in plan_of(run).on_node(args.rank))
    return replace(wanted, rank_node=node, rank_replicas=replicas)


def _follow(run: Run, wanted: Wanted, show: Show) -> None:
    """The last lines of each file, then all news. Files that appear later are taken in."""
    from ..control import wait_until_over

    tails: dict[str, tuple[LogFile, Tail]] = {}
    first = True
    ask_at = 0.0
    while True:
        # Asked before reading, so that what was written before the end is read after it.
        over = False
        if time.monotonic() >= ask_at:
            over = wait_until_over(run, 0.0)
            ask_at = time.monotonic() + _ENDED_EVERY
        for file in log_files(run.directory.logs, wanted):
            known = file.label in tails
            lines = tails.setdefault(file.label, (file, Tail(file.path)))[1].lines()
            for line in lines if known or not first else lines[-_LAST_LINES:]:
                show(file, line)
        if over:
            for file, tail in tails.values():
                for line in tail.rest():
                    show(file, line)
            return
        sys.stdout.flush()
        first = False
        time.sleep(_GLANCE)
