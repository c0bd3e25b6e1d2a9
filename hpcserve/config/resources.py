"""Finds templates/ and site-configs/: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent.parent


def resources(kind: Literal["templates", "site-configs"]) -> Path:
    """The directory of shipped templates or site configs."""
    installed = _PACKAGE / "data" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind
