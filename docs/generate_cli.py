"""Writes docs/reference/cli.md from the parsers; with --check it only compares, and fails if they differ."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcserve.cli.arguments import Parser
from hpcserve.cli.main import COMMANDS, parser_for

TARGET = Path(__file__).parent / "reference" / "cli.md"

_HEAD = """# Commands

Generated from the program by `python docs/generate_cli.py`; don't edit.

Data goes to stdout, everything else to stderr. `NO_COLOR` turns colours off. Every command takes
`--debug`, which shows a traceback with an error. A `RUN` is the name that `launch` printed, its
beginning, or a job id.

| exit status | meaning |
|---|---|
| 0 | success |
| 1 | a bug in hpcserve; a traceback is printed |
| 2 | the command line is wrong |
| 3 | model.yaml, a site config, a flag's value or a variable is wrong |
| 4 | the request can't be placed on these nodes and GPUs |
| 5 | Slurm refused the job, or can't be reached |
| 6 | the job ran and failed |
| 7 | a run directory can't be written |
| 8 | no such run, or its endpoint does not answer |
| 9 | so many rows of a batch fail that it was stopped |
| 75 | a batch has more to do: the same command goes on with it |
| 130 | Ctrl-C, or nobody reads the output any more |

| variable | meaning |
|---|---|
| `HPCSERVE_SITE` | the site to use, when there is no `--site` |
| `HPCSERVE_SITES` | directories of site configs, separated by colons, searched first |
| `HPCSERVE_RUNS` | directory of run directories; wins over the site's `storage.runs` |
"""


def reference() -> str:
    return "\n".join([_HEAD, *(_section(command, parser_for(command)) for command in COMMANDS)])


def _section(command: str, parser: Parser) -> str:
    lines = [f"## hpcserve {command}", "", (parser.description or "").strip(), ""]
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not kinds:
        return "\n".join([*lines, *_rows(parser), ""])
    for action in kinds:
        for choice in action._choices_actions:
            lines += [f"### hpcserve {command} {choice.dest}", "", f"{choice.help}", ""]
            lines += [*_rows(action.choices[choice.dest]), ""]
    return "\n".join(lines)


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "| argument | meaning |"
    yield "|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.dest == "debug":
            continue
        told = (action.help or "") % vars(action)
        yield f"| {_spelling(action)} | {told.replace('|', chr(92) + '|')} |"


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        name = str(action.metavar or action.dest)
        return f"`{name}`" if action.required else f"`[{name}]`"
    value = ""
    if action.nargs != 0:
        choices = ",".join(map(str, action.choices)) if action.choices else None
        value = f" {'{' + choices + '}' if choices else action.metavar or action.dest.upper()}"
    # A bar inside a table cell has to be escaped, also in code.
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    text = reference()
    if parser.parse_args().check:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} is out of date: run `python docs/generate_cli.py`", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    temporary = TARGET.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, TARGET)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
