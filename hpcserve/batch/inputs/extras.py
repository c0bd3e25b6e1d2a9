"""Packages that only the extra `batch` brings."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import ConfigError


def need(module: str, purpose: str) -> Any:
    """The imported module; `purpose` begins the error's message. Raises ConfigError without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package}, which can't be imported: {error}",
            hint="Install it with `pip install 'hpcserve[batch]'`.",
        ) from error
