"""The arguments that `launch`, `render` and `explain` share."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Parser, positive
from .output import warn

if TYPE_CHECKING:
    from ..launch import LaunchRequest, Prepared
    from ..plan.plan import BatchPlan


def add_request(parser: Parser) -> None:
    parser.add_argument("model", type=Path, metavar="model.yaml", help="what to serve")
    add_job(parser)


def add_job(parser: Parser) -> None:
    """Everything about the job but what it serves."""
    parser.add_argument("--nodes", type=positive, metavar="N", help="nodes of the job; the one dial")
    parser.add_argument("--prefill", type=positive, metavar="N", help="nodes that compute prompts")
    parser.add_argument("--decode", type=positive, metavar="N", help="nodes that write answers")
    parser.add_argument("--walltime", metavar="TIME", help="minutes or [D-]HH:MM:SS, as for sbatch")
    parser.add_argument("--name", help="name of the run (default: the model's)")
    parser.add_argument(
        "--site", metavar="NAME|FILE", help="site config (default: $HPCSERVE_SITE, or by host name)"
    )
    parser.add_argument("--account", help="account to charge")
    parser.add_argument("--partition", help="partition to submit to")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key of model.yaml, such as decode.tensor_parallel=8; may be repeated",
    )


def prepare(args: argparse.Namespace, batch: BatchPlan | None = None) -> Prepared:
    from ..launch import prepare

    return prepare(request_of(args, batch), os.environ, os.uname().nodename)


def request_of(args: argparse.Namespace, batch: BatchPlan | None = None) -> LaunchRequest:
    from ..config.quantities import parse_duration
    from ..launch import LaunchRequest

    if args.walltime is not None and re.fullmatch(r"\d+:\d\d", args.walltime):
        # sbatch reads it so; people who write 4:00 mostly mean hours.
        warn(f"--walltime {args.walltime} is minutes and seconds", f"for hours write {args.walltime}:00")
    return LaunchRequest(
        model=args.model,
        nodes=args.nodes,
        prefill=args.prefill,
        decode=args.decode,
        walltime=None if args.walltime is None else parse_duration(args.walltime, what="--walltime"),
        name=args.name,
        account=args.account,
        partition=args.partition,
        site=args.site,
        overrides=tuple(args.overrides),
        batch=batch,
    )
