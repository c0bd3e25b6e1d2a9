"""`python -m hpcserve.router --config FILE [--control-fd N]`: the supervisor; it starts the relays itself."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from pathlib import Path

from ..errors import HpcserveError
from . import config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpcserve.router", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON written by the head node")
    parser.add_argument("--control-fd", type=int, help="inherited socket to the head node, or the supervisor")
    parser.add_argument("--relay", type=int, metavar="N", help="be relay N of the supervisor that says so")
    parser.add_argument("--sockets", default="", metavar="FD,…", help="inherited sockets a relay listens on")
    parser.add_argument("--board-fd", type=int, help="inherited memory of the relays' common figures")
    args = parser.parse_args(argv)
    name = "" if args.relay is None else f" relay {args.relay}:"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s{name} %(name)s: %(message)s")
    try:
        loaded = config.load(args.config)
        return _supervise(loaded, args) if args.relay is None else _relay(loaded, args)
    except HpcserveError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code


def _supervise(loaded: config.RouterConfig, args: argparse.Namespace) -> int:
    from .supervisor import Supervisor

    async def run() -> int:
        return await Supervisor(loaded, args.config).run(args.control_fd)

    return asyncio.run(run())


def _relay(loaded: config.RouterConfig, args: argparse.Namespace) -> int:
    # The supervisor does without these, and stays small.
    import uvloop

    from .process import Relay

    sockets = [socket.socket(fileno=int(fd)) for fd in args.sockets.split(",")]

    async def run() -> int:
        relay = Relay(loaded, number=args.relay, board_fd=args.board_fd)
        return await relay.run(args.control_fd, sockets)

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main())
