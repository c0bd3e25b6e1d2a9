"""Collects why each value of a plan is what it is."""

from __future__ import annotations

import re

from .plan import Explanation, OriginKind
from .request import PlanRequest

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")


def show(value: object) -> str:
    """A value as model.yaml would spell it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def duration(seconds: int) -> str:
    """`HH:MM:SS`, or `D-HH:MM:SS` from one day on: Slurm's own spelling."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}" if days else f"{hour:02}:{minute:02}:{second:02}"


def count(number: int, unit: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{number} {unit}{'s' * (number != 1)}"


class Notes:
    """Explanations in the order they were found; one per key."""

    def __init__(self, request: PlanRequest) -> None:
        self._origins = request.origins
        self._notes: dict[str, Explanation] = {}

    def derived(self, key: str, value: object, reason: str) -> None:
        self._add(key, value, "derived", reason)

    def flag(self, key: str, value: object, flag: str) -> None:
        self._add(key, value, "flag", flag)

    def default(self, key: str, value: object, reason: str = "built in") -> None:
        self._add(key, value, "default", reason)

    def site(self, key: str, value: object, site_key: str) -> None:
        """A value from the site config; `site_key` is its dotted key there."""
        self._add(key, value, "site", self._origins.get(f"site.{site_key}", site_key))

    def model(self, key: str, value: object) -> None:
        """A value that model.yaml (or `--set`, or a variable) gave under the same key."""
        where = self._origins.get(key, f"model.yaml: {key}")
        self._add(key, value, _kind(where), where)

    def all(self) -> tuple[Explanation, ...]:
        return tuple(self._notes.values())

    def _add(self, key: str, value: object, origin: OriginKind, where: str) -> None:
        self._notes[key] = Explanation(key=key, value=show(value), origin=origin, where=where)


def _kind(where: str) -> OriginKind:
    if where.startswith("-"):
        return "flag"
    if _VARIABLE.fullmatch(where):
        return "environment"
    return "model.yaml"
