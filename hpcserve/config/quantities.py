"""Durations as Slurm writes them.

Forms of `--time` in sbatch(1): `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`.
"""

from __future__ import annotations

import re

from ..errors import ConfigError

FORMS = "MM:SS, HH:MM:SS or D-HH[:MM[:SS]]"

CLOCK = (
    r"(?:[0-9]{1,7}:[0-5]?[0-9]|[0-9]{1,7}:[0-5]?[0-9]:[0-5]?[0-9]"
    r"|[0-9]{1,4}-(?:[01]?[0-9]|2[0-3])(?::[0-5]?[0-9]){0,2})"
)
"""Every form but bare minutes, as a regular expression."""

_CLOCK = re.compile(CLOCK)
_MINUTES = re.compile(r"[0-9]{1,7}")


def parse_duration(text: str, *, what: str = "duration") -> int:
    """Seconds of a Slurm time limit; a bare number is minutes, as in `sbatch --time`.

    `what` names the flag or variable in the error. Raises ConfigError.
    """
    if _MINUTES.fullmatch(text):
        return int(text) * 60
    seconds = clock_seconds(text)
    if seconds is None:
        raise ConfigError(
            f"{what}: '{text}' is not a duration; allowed: minutes, {FORMS}",
            hint=f"For four hours write {format_duration(4 * 3600)} or 240.",
        )
    return seconds


def clock_seconds(text: str) -> int | None:
    """Seconds of the forms with a colon or a day; None for anything else, bare numbers included."""
    if not _CLOCK.fullmatch(text):
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    missing = [0] * (3 - len(parts))
    # Slurm counts from the left after a day (D-HH:MM) and from the right without one (MM:SS).
    hours, minutes, seconds = [*parts, *missing] if dash else [*missing, *parts]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def format_duration(seconds: int) -> str:
    """`HH:MM:SS`, or `D-HH:MM:SS` from one day on; Slurm and `parse_duration` read it back."""
    if seconds < 0:
        raise ValueError(f"a duration can't be negative: {seconds}")
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock
