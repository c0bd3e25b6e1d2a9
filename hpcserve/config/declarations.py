"""What a configuration dataclass declares, with its type hints resolved.

The loader, the JSON schema and the reference in docs/ read keys through this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from .keys import KeyInfo

Shape: TypeAlias = Literal[
    "text", "integer", "number", "boolean", "strings", "environment", "free", "section", "sections"
]
"""`strings` is a list of text, `environment` a mapping of variables, `free` a mapping of anything,
`section` a nested dataclass, `sections` a mapping of names to such."""

_SHAPES: Mapping[object, Shape] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    tuple[str, ...]: "strings",
    Mapping[str, str]: "environment",
    Mapping[str, Any]: "free",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """One key of a section."""

    name: str
    shape: Shape
    optional: bool
    """None (YAML `null`) is allowed."""
    choices: tuple[str, ...]
    section: type | None
    info: KeyInfo
    default: Any
    """MISSING for a required key."""

    @property
    def required(self) -> bool:
        return self.default is MISSING


@cache
def declared(section: Callable[..., Any]) -> Mapping[str, Declared]:
    """The keys of a section, in the order they are written in its class."""
    hints = get_type_hints(section)
    result: dict[str, Declared] = {}
    for item in fields(cast("type[Any]", section)):
        info = item.metadata["key"]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        result[item.name] = _declare(item.name, hints[item.name], info, default)
    return result


def _declare(name: str, hint: Any, info: KeyInfo, default: Any) -> Declared:
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    literal = get_origin(hint) is Literal
    several = get_origin(hint) is Mapping and isinstance(get_args(hint)[1], type) and hint not in _SHAPES
    shape: Shape = "text" if literal else _SHAPES.get(hint, "sections" if several else "section")
    inner = get_args(hint)[1] if several else hint
    return Declared(
        name=name,
        shape=shape,
        optional=optional,
        choices=get_args(hint) if literal else info.choices,
        section=inner if shape in ("section", "sections") else None,
        info=info,
        default=default,
    )


def paths(section: Callable[..., Any], prefix: str = "") -> Iterator[tuple[str, Declared]]:
    """Every key below `section` with its dotted path, sections before what is in them."""
    for name, item in declared(section).items():
        yield prefix + name, item
        if item.section is not None:
            yield from paths(item.section, f"{prefix}{name}.{'NAME.' * (item.shape == 'sections')}")
