"""Print the job script of a launch, as `launch` would submit it."""

from __future__ import annotations

import argparse
import sys

from .arguments import Parser
from .request import add_request, prepare


def add_arguments(parser: Parser) -> None:
    add_request(parser)


def run(args: argparse.Namespace) -> int:
    from ..launch import files

    sys.stdout.write(files(prepare(args))["job.sh"])
    return 0
