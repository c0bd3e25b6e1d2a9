"""Names of the files of the Batch API, all below the run's directory `batches`.

api.json              where the process listens, and what the router must say to it (0600)
files/ID.json         a file: its object, and whose it is
files/ID.jsonl        what was uploaded
batches/ID.json       a batch: its object, and whose it is
work/ID/              carries it out; see ../layout.py. Its output and error files stay there
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..layout import BatchDir


@dataclass(frozen=True, slots=True)
class ApiDir:
    """Paths below one directory."""

    root: Path

    @property
    def address(self) -> Path:
        return self.root / "api.json"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def batches(self) -> Path:
        return self.root / "batches"

    def work(self, batch: str) -> BatchDir:
        return BatchDir(self.root / "work" / batch)
