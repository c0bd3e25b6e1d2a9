"""A table in lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .answers import Answer
from .file import LinesWriter
from .table import table_row
from .text import json_bytes


class JsonlWriter(LinesWriter):
    def __init__(self, path: Path, *, samples: int = 1) -> None:
        super().__init__(path)
        self._samples = samples

    def write(self, answer: Answer) -> None:
        self.write_row(table_row(answer, samples=self._samples))

    def write_row(self, row: dict[str, Any]) -> None:
        self._files[0].write_line(json_bytes(row))
