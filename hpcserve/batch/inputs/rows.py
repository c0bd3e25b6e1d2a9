"""One row of the input, and what can be wrong with it."""

from __future__ import annotations

from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True):
    number: int
    """From 0, over all input files in order."""
    place: str
    """For people: `data.jsonl:17` is a line, counted from 1; `part-3.parquet row 5` a row, from 0."""
    columns: dict[str, Any]


class RowError(Exception):
    """A row of which no request can be made: a variable is undefined, a type is wrong, there is no text."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
