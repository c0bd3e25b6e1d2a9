"""One variable of an engine's environment, with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    name: str
    value: str
    why: str
    """The fact it follows from, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """One thing that is worse than the site promises."""

    message: str
    hint: str
