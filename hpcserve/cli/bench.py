"""Measure the router: `bench router` against its peers on mock engines, `bench replay` on a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .arguments import Parser, positive
from .output import print_json, say

if TYPE_CHECKING:
    from ..bench.replay.simulate import Setup
    from ..bench.replay.trace import TraceRequest

_LIVE_REQUESTS = 2000
"""Ten minutes of Mooncake's conversation trace: enough to fill eight caches of 2000 blocks."""


def add_arguments(parser: Parser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    router = kinds.add_parser("router", help="this router and every installed peer on the same mock engines")
    router.add_argument("--peers", type=Path, metavar="DIR", help="where peers are installed, besides PATH")
    router.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these routers alone")
    router.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="runs of each, the best counts (default: 3)",
    )
    router.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write JSON, and a drawing beside it"
    )
    router.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    replay = kinds.add_parser("replay", help="a request trace through routing policies, in a simulation")
    source = replay.add_mutually_exclusive_group(required=True)
    source.add_argument("trace", nargs="?", type=Path, metavar="FILE", help="a trace in Mooncake's format")
    source.add_argument("--synthetic", metavar="KIND", help="a made-up trace in place of a file")
    replay.add_argument(
        "--requests", type=positive, metavar="N", help="the first N requests (made up: 6000; live: 2000)"
    )
    replay.add_argument("--workers", type=positive, default=8, metavar="N", help="engines (default: 8)")
    replay.add_argument(
        "--blocks", type=positive, default=2000, metavar="N", help="512-token blocks of each (default: 2000)"
    )
    replay.add_argument("--speed", type=float, default=1.0, metavar="X", help="play X times as fast")
    replay.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these policies alone; live: these routers"
    )
    replay.add_argument(
        "--live",
        action="store_true",
        help="play it against this router and every installed peer, before fake engines on this machine",
    )
    replay.add_argument("--peers", type=Path, metavar="DIR", help="live: where peers are installed")
    replay.add_argument(
        "--pace",
        type=float,
        default=8.0,
        metavar="X",
        help="live: the clock runs X times as fast, the engines' too (default: 8)",
    )
    replay.add_argument("-o", "--output", type=Path, metavar="FILE", help="write JSON")
    replay.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    if args.kind == "router":
        return _router(args)
    if args.kind == "replay":
        return _replay(args)
    raise UsageError(f"there is no benchmark {args.kind!r}", hint="see `hpcserve bench --help`")


def _router(args: argparse.Namespace) -> int:
    import json
    import tempfile

    from ..bench.router import report
    from ..bench.router.compare import compare

    peers = args.peers.absolute() if args.peers is not None else None
    with tempfile.NamedTemporaryFile(prefix="hpcserve-bench-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    found = compare(directory=peers, only=args.only, rounds=args.rounds, log=log, say=say)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        args.output.with_suffix(".svg").write_text(report.svg(found["routers"]))
    if args.json:
        print_json(found)
    else:
        sys.stdout.write(report.table(found["routers"]))
    if any(figures is not None and "failed" in figures for figures in found["routers"].values()):
        say(f"the routers' own output is in {log}")
        return 1
    log.unlink()
    return 0


def _replay(args: argparse.Namespace) -> int:
    import json

    from ..bench.replay import report
    from ..bench.replay.compare import compare
    from ..bench.replay.engine import EngineModel
    from ..bench.replay.simulate import Setup

    for flag, value in (("--speed", args.speed), ("--pace", args.pace)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{flag} {value:g} must be above 0", hint="1 is the trace's own speed")
    requests = _requests(args)
    setup = Setup(workers=args.workers, engine=EngineModel(blocks=args.blocks))
    if args.live:
        return _live(args, requests, setup)
    found = compare(requests, setup, only=args.only, say=say)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        print_json(found)
    else:
        sys.stdout.write(report.table(found))
    return 0


def _requests(args: argparse.Namespace) -> list[TraceRequest]:
    from ..bench.replay import synthetic, trace

    limit = args.requests or (_LIVE_REQUESTS if args.live else None)
    if args.trace is not None:
        return trace.read(args.trace, limit=limit, speed=args.speed)
    if args.synthetic in synthetic.SYNTHETIC:
        return trace.sped(synthetic.SYNTHETIC[args.synthetic](limit or 6000, 0), args.speed)
    kinds = ", ".join(synthetic.SYNTHETIC)
    raise UsageError(f"there is no made-up trace {args.synthetic!r}", hint=f"kinds are {kinds}")


def _live(args: argparse.Namespace, requests: list[TraceRequest], setup: Setup) -> int:
    import json
    import tempfile

    from ..bench.replay.live import report
    from ..bench.replay.live.compare import compare
    from ..bench.replay.live.scale import Scale

    peers = args.peers.absolute() if args.peers is not None else None
    with tempfile.NamedTemporaryFile(prefix="hpcserve-replay-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    found = compare(requests, setup, Scale(pace=args.pace), directory=peers, only=args.only, log=log, say=say)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        print_json(found)
    else:
        sys.stdout.write(report.table(found))
    if any(figures is not None and figures.get("failed") for figures in found["routers"].values()):
        say(f"what engines and routers wrote is in {log}")
        return 1
    log.unlink()
    return 0
