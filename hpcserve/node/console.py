"""What in-job programs print: their logs are files on the shared file system, and that may be full."""

from __future__ import annotations

import os
from contextlib import suppress

_STDERR = 2


def say(text: str) -> None:
    """Write one text to the program's log. Never fails: a log that can't be written must not end a run."""
    # Past Python's buffers: what a full disk refuses would stay there and fail again at exit.
    with suppress(OSError):
        os.write(_STDERR, (text + "\n").encode("utf-8", "backslashreplace"))


def warn(message: str, hint: str | None = None) -> None:
    """A warning and its remedy, in the form errors have."""
    say(f"warning: {message}" + (f"\nhint: {hint}" if hint else ""))
