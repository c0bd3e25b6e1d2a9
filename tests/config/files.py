from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class Files:
    """Writes configuration files below a directory; names in messages are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def environ(self, **extra: str) -> Mapping[str, str]:
        """An environment whose home is here and empty unless written to."""
        return {"HOME": str(self.root / "home"), **extra}
