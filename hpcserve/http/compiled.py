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


def compiled(name: str, what: str) -> Any | None:
    """The module `hpcserve.NAME`; None, with a warning that begins with `what`, where it was not compiled or
    its source has changed since. Without it, the same is done by Python."""
    if os.environ.get(PURE) == "1":
        return None
    try:
        module = importlib.import_module(f"hpcserve.{name}")
    except ImportError as error:
        log.warning(
            "%s costs more CPU time than it could, for hpcserve.%s was not compiled: %s", what, name, error
        )
        return None
    source = _PACKAGE.joinpath(*name.split(".")).with_suffix(".pyx")
    if source.exists() and digest(source) != module.SOURCE:
        log.warning(
            "hpcserve.%s is not used: it was compiled from another %s; install hpcserve again",
            name,
            source.name,
        )
        return None
    return module


def digest(source: Path) -> str:
    """SHA-256 of a module's source and of the declarations beside it."""
    found = hashlib.sha256(source.read_bytes())
    for beside in sorted(source.parent.glob("*.pxd")):
        found.update(beside.read_bytes())
    return found.hexdigest()
