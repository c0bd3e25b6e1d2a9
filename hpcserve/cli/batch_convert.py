"""Write a batch's results as a table of another format.

Answers as OpenAI's batch lines become JSON Lines or Parquet, and these become each other. A table has no
whole answers, so it can't become batch lines again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, add_json
from .output import print_json, say, warn


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="output.jsonl, output.parquet, or the output directory with the two files of OpenAI's format",
    )
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="a new file, of which the suffix is .jsonl or .parquet"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..batch.inputs.extras import need

    need("pyarrow", "`hpcserve batch convert`")
    from ..batch.outputs.convert import convert

    rows = convert(args.source, args.target, warn=warn)
    if args.json:
        print_json({"rows": rows, "output": str(args.target.absolute())})
        return 0
    say(f"{rows:,} rows")
    print(args.target)
    return 0
