"""What an engine's log says about how far it has loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable

Says = tuple[re.Pattern[str], str]
"""What a line has, and what that means for people, with the pattern's groups as `\\1`."""


def told(line: str, known: Iterable[Says]) -> str | None:
    """By the first of `known` that fits; None where none does."""
    # A progress bar rewrites its line with carriage returns: the last state counts.
    text = line.rstrip("\r\n").rpartition("\r")[2]
    for pattern, says in known:
        match = pattern.search(text)
        if match:
            return match.expand(says)
    return None
