"""How commands talk: data to stdout, everything else to stderr, understandable without colour."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ..errors import HpcserveError

SCHEMA_VERSION = 1
"""Of every `--json` document; it grows when a field is removed or changes its meaning."""

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1"}


def coloured(stream: TextIO) -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and stream.isatty()


def paint(text: str, colour: str, stream: TextIO) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if coloured(stream) else text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(message: str, hint: str | None = None) -> None:
    say(f"{paint('warning:', 'yellow', sys.stderr)} {message}")
    if hint:
        say(f"{paint('hint:', 'cyan', sys.stderr)} {hint}")


def report(error: HpcserveError) -> None:
    say(f"{paint('error:', 'red', sys.stderr)} {error.message}")
    if error.hint:
        say(f"\n{paint('hint:', 'cyan', sys.stderr)} {error.hint}")


def print_json(fields: Mapping[str, Any]) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the last one ragged; lines have no trailing blanks."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
