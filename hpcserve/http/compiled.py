"""Modules that hatch_build.py compiles when hpcserve is installed: where they were, and from this source."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PURE = "HPCSERVE_PURE"
"""Set to 1 in the environment, nothing compiled is used: to find out whether a fault is in that."""
_PACKAGE = Path(__file__).resolve().parents[1]


_told: set[str] = set()
"""What was warned of: all modules are missing for the same reason, and one warning is enough."""


def compiled(name: str, what: str) -> Any | None:
    """The module `hpcserve.NAME`; None, with a warning that begins with `what`, where it was not compiled or
    its source has changed since. Without it, the same is done by Python."""
    if os.environ.get(PURE) == "1":
        return None
    try:
        module = importlib.import_module(f"hpcserve.{name}")
    except ImportError as error:
        _warn("missing", "%s costs more CPU time than it could, for hpcserve.%s was not compiled: %s; install"
              " hpcserve again with a C compiler and Python's headers", what, name, error)  # fmt: skip
        return None
    source = _PACKAGE.joinpath(*name.split(".")).with_suffix(".pyx")
    if source.exists() and digest(source) != module.SOURCE:
        text = "hpcserve.%s is not used: it was compiled from another %s; install hpcserve again"
        _warn(name, text, name, source.name)
        return None
    return module


def _warn(kind: str, text: str, *given: object) -> None:
    if kind not in _told:
        _told.add(kind)
        log.warning(text, *given)


def digest(source: Path) -> str:
    """SHA-256 of a module's source and of the declarations beside it."""
    found = hashlib.sha256(source.read_bytes())
    for beside in sorted(source.parent.glob("*.pxd")):
        found.update(beside.read_bytes())
    return found.hexdigest()
