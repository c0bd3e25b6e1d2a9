"""Frozen dataclasses as JSON and back, strictly: plan.json and its kind.

A dataclass is an object with all its fields, a tuple an array. Reading back gives an equal value,
or a ConfigError that names the place as a path from the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

T = TypeVar("T")


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass instance as an object that `json.dumps` takes. TypeError for a value JSON can't hold."""
    if not is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"not a dataclass instance: {record!r}")
    return {item.name: _dump(getattr(record, item.name)) for item in fields(record)}


def _dump(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"JSON has no {value}")
        return value
    if isinstance(value, tuple | list):
        return [_dump(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"a JSON object needs text keys: {value!r}")
        return {name: _dump(item) for name, item in value.items()}
    return to_json(value)


def from_json(kind: type[T], data: Any, *, where: str = "") -> T:
    """`data` (what `json.loads` gave) as `kind`; `where` is the file's name. Raises ConfigError.

    A field with a default may be absent, so that an older hpcserve's file is read. An unknown one may not be.
    """
    result: T = _record(kind, data, _Path(where, ()))
    return result


class _Path:
    """The way to a value, written only when there is an error."""

    __slots__ = ("file", "steps")

    def __init__(self, file: str, steps: tuple[str, ...]) -> None:
        self.file = file
        self.steps = steps

    def down(self, step: str) -> _Path:
        return _Path(self.file, (*self.steps, step))

    def error(self, problem: str) -> ConfigError:
        name = ".".join(self.steps) or "the top"
        start = f"{self.file}: " if self.file else ""
        return ConfigError(
            f"{start}{name} {problem}",
            hint="The file was changed or comes from another version of hpcserve; launch again.",
        )


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _record(kind: Any, data: Any, path: _Path) -> Any:
    if not isinstance(data, dict):
        raise path.error(f"must be an object, not {_name(data)}")
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for item in fields(kind):
        if item.name in data:
            values[item.name] = _load(hints[item.name], data[item.name], path.down(item.name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise path.error(f"has no '{item.name}'")
    unknown = [name for name in data if name not in hints]
    if unknown:
        raise path.error(f"has an unknown field '{unknown[0]}'")
    return kind(**values)


def _load(hint: Any, data: Any, path: _Path) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _union(hint, data, path)
    if origin is Literal:
        # `is` on the type: 1 == True, and a Literal of texts must not take either.
        if not any(data == choice and type(data) is type(choice) for choice in get_args(hint)):
            raise path.error(f"must be one of {', '.join(map(str, get_args(hint)))}, not {data!r}")
        return data
    if origin is tuple:
        return _tuple(get_args(hint), data, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(get_args(hint)[1], data, path)
    if hint is Any:
        return data
    if is_dataclass(hint):
        return _record(hint, data, path)
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        raise path.error(f"must be {hint.__name__}, not {_name(data)}")
    return data


def _union(hint: Any, data: Any, path: _Path) -> Any:
    choices = get_args(hint)
    if data is None:
        if NoneType in choices:
            return None
        raise path.error("must not be null")
    kinds = [choice for choice in choices if choice is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"from_json reads X | None, not {hint}")
    return _load(kinds[0], data, path)


def _tuple(kinds: tuple[Any, ...], data: Any, path: _Path) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise path.error(f"must be an array, not {_name(data)}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    elif len(kinds) != len(data):
        raise path.error(f"must have {len(kinds)} items, not {len(data)}")
    return tuple(
        _load(kind, item, path.down(str(number)))
        for number, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _mapping(kind: Any, data: Any, path: _Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise path.error(f"must be an object, not {_name(data)}")
    return {name: _load(kind, item, path.down(name)) for name, item in data.items()}


def _name(data: Any) -> str:
    return "null" if data is None else type(data).__name__
