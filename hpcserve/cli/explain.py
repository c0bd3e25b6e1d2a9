"""Show every value a launch derives, and where it comes from."""

from __future__ import annotations

import argparse

from .arguments import Parser, add_json
from .output import print_json, table
from .request import add_request, prepare


def add_arguments(parser: Parser) -> None:
    add_request(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..config.load import to_json

    prepared = prepare(args)
    notes = prepared.plan.explanations
    if args.json:
        print_json(
            {
                "site": {
                    "name": prepared.site.value.name,
                    "file": prepared.site.file,
                    "where": prepared.site.where,
                },
                "values": [to_json(note) for note in notes],
            }
        )
        return 0
    rows = [(note.key, note.value, note.origin, note.where) for note in notes]
    rows.append(("site config", prepared.site.file, "site", prepared.site.where))
    rows.append(("run directory", str(prepared.run_path), "site", "storage.runs, or HPCSERVE_RUNS"))
    print(table(("KEY", "VALUE", "ORIGIN", "WHERE"), rows))
    return 0
