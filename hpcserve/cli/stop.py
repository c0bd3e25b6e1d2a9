"""Drain and end a run: it takes no new requests and finishes those it has. A second call ends it at once."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from .arguments import Parser, add_json, add_run
from .named import named_run, plan_of
from .output import print_json, say

_MARGIN = 30
"""Seconds beyond drain and KillWait for the processes to be gone."""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        help="how long to wait for the end (default: what draining may take; 0: don't wait)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..control import stop, wait_until_over

    wait = _seconds(args.wait)
    run = named_run(args.run)
    done = stop(run)
    name = run.record.run_id
    over = done.action == "none"
    if not over:
        say(_words(name, done.action, done.detail))
        if wait is None:
            plan = plan_of(run)
            wait = plan.model.drain + plan.site.slurm.kill_wait + _MARGIN
        over = wait_until_over(run, wait)
    if args.json:
        print_json({"name": name, "action": done.action, "detail": done.detail, "over": over})
    elif done.action == "none":
        say(f"{name} is over already: {done.detail}")
    elif over:
        say(f"{name} is over; its logs: `hpcserve logs {name}`")
    else:
        say(f"{name} still runs; end it at once with `hpcserve stop {name}`")
    return 0


def _words(name: str, action: str, detail: str) -> str:
    if action == "cancelled":
        return f"{name} is taken out of the queue"
    if action == "forced":
        return f"{name} was asked to stop before: ending it now"
    why = f" (by signal: {detail})" if detail else ""
    return f"{name} drains: no new requests, running ones finish{why}; call again to end it at once"


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"--wait {text!r} is not a number of seconds from 0", hint="for example `--wait 60`")
    return seconds
