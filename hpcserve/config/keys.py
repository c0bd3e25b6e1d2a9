"""How a configuration key is declared: its default, its meaning and its limits in one place.

The loader (`load.py`), the JSON schema (`schema.py`) and the reference in docs/ all read these
declarations, so a key is described once.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

Kind = Literal["plain", "duration", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """Limits of one key.

    `kind="duration"` reads seconds (int) or `[D-]HH:MM:SS`. `kind="text"` may have several lines;
    all other texts are one line.
    """

    doc: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    kind: Kind = "plain"
    example: str | None = None


def key(
    doc: str,
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
    kind: Kind = "plain",
    example: str | None = None,
) -> Any:
    """Declare a dataclass field that is also a configuration key."""
    info = KeyInfo(
        doc=doc,
        choices=choices,
        minimum=minimum,
        maximum=maximum,
        pattern=pattern,
        kind=kind,
        example=example,
    )
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"key": info})
    if default is not MISSING:
        return field(default=default, metadata={"key": info})
    return field(metadata={"key": info})
