"""Strict reading of YAML into the configuration dataclasses, with the origin of every value.

A wrong key or value is one ConfigError that starts with `FILE:LINE:`. Nothing is converted
silently: `yes` is not true, `"8"` is not eight, `010` is refused, `04:00:00` is four hours.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ConfigError
from .declarations import Declared, declared, paths
from .document import Items, Node, Scalar, Table, describe, parse_document, parse_value, read_text
from .model import ModelSpec
from .quantities import FORMS, clock_seconds
from .records import from_json, to_json

__all__ = ["Loaded", "build", "from_json", "load_model", "nearest", "set_value", "to_json"]

T = TypeVar("T")

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_NUMBER = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
SECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*", re.ASCII)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_MAX_DIGITS = 18

# What YAML 1.1 readers turn into a boolean or a number and YAML 1.2 readers do not.
_AMBIGUOUS = re.compile(
    r"yes|no|on|off|[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*_[0-9_]*|[-+]?0[box][0-9a-f_]+"
    r"|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[-+]?\.(inf|nan)",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[T]):
    """A value and where its parts come from."""

    value: T
    origins: Mapping[str, str]
    """Dotted key to `FILE:LINE` or `--set KEY`; a key left at its default is absent."""
    file: str
    where: str
    """Why this file: for a site `--site`, `HPCSERVE_SITE`, `model.yaml:3` or the host name that matched."""


def load_model(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[ModelSpec]:
    """Read model.yaml and lay `--set KEY=VALUE` overrides on it. Raises ConfigError."""
    table = parse_document(read_text(Path(path), what="model.yaml"), str(path))
    for override in overrides:
        table = set_value(table, override)
    value, origins = build(ModelSpec, table)
    return Loaded(value=value, origins=origins, file=str(path), where=str(path))


def set_value(table: Table, override: str) -> Table:
    """`table` with one `KEY=VALUE` laid on it; VALUE is YAML. Raises ConfigError."""
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must be KEY=VALUE", hint="For example --set decode.replicas=2.")
    return _set(table, keys, parse_value(text, f"--set {name}"), done="")


def _set(table: Table, keys: Sequence[str], node: Node, done: str) -> Table:
    entries = dict(table.entries)
    head, *rest = keys
    if not rest:
        entries[head] = node
        return Table(entries=entries, origin=table.origin)
    below = entries.get(head, Table(entries={}, origin=node.origin))
    if not isinstance(below, Table):
        if not _is_null(below):
            raise ConfigError(
                f"{node.origin}: key '{done}{head}' at {below.origin} is {describe(below)}, not a mapping",
                hint=f"Set '{done}{head}' itself.",
            )
        below = Table(entries={}, origin=node.origin)
    entries[head] = _set(below, rest, node, done=f"{done}{head}.")
    return Table(entries=entries, origin=table.origin)


def build(section: Callable[..., T], table: Table) -> tuple[T, dict[str, str]]:
    """`table` as `section`, and the origin of every key in it. Raises ConfigError."""
    origins: dict[str, str] = {}
    return _Reader(section, origins).section(section, table, ""), origins


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that `word` is probably a misspelling of."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return match[0] if match else None


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.plain and node.text in _NULL


class _Reader:
    """Reads nodes by their declarations, and records origins on the way."""

    def __init__(self, root: Callable[..., Any], origins: dict[str, str]) -> None:
        self._root = root
        self._origins = origins

    def section(self, section: Callable[..., T], table: Table, prefix: str) -> T:
        keys = declared(section)
        values: dict[str, Any] = {}
        for name, node in table.entries.items():
            if name not in keys:
                raise self._unknown(name, node.origin, keys, prefix)
            values[name] = self._value(keys[name], node, prefix + name)
        for name, item in keys.items():
            if item.required and name not in values:
                example = f" for example `{name}: {item.info.example}`." if item.info.example else ""
                raise ConfigError(
                    f"{table.origin}: key '{prefix}{name}' is missing",
                    hint=f"{item.info.doc}{' Write' if example else ''}{example}",
                )
        return section(**values)

    def _unknown(self, name: str, origin: str, keys: Mapping[str, Declared], prefix: str) -> ConfigError:
        close = nearest(name, keys) or nearest(name.replace("-", "_"), keys)
        if close:
            hint = f"Did you mean '{prefix}{close}'?"
        else:
            elsewhere = [path for path, _ in paths(self._root) if path.rpartition(".")[2] == name]
            hint = (
                f"'{name}' belongs at {_either(elsewhere)}."
                if elsewhere
                else "Remove the key, or see the reference for what there is."
            )
        return ConfigError(
            f"{origin}: key '{prefix}{name}' is unknown; allowed here: {', '.join(keys)}", hint=hint
        )

    def _value(self, item: Declared, node: Node, path: str) -> Any:
        self._origins[path] = node.origin
        if _is_null(node):
            return self._null(item, node, path)
        if item.shape == "sections":
            return self._sections(item, _table(item, node, path), path)
        if item.section is not None:
            return self.section(item.section, _table(item, node, path), f"{path}.")
        if item.shape == "environment":
            return self._environment(_table(item, node, path), path)
        if item.shape == "free":
            return self._free_table(_table(item, node, path), path)
        if item.shape == "strings":
            return self._strings(item, node, path)
        if not isinstance(node, Scalar):
            raise _wrong(item, node, path)
        return _scalar(item, node, path)

    def _sections(self, item: Declared, table: Table, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, node in table.entries.items():
            at = f"{path}.{name}"
            self._origins[at] = node.origin
            if not SECTION_NAME.fullmatch(name):
                raise ConfigError(
                    f"{node.origin}: key '{at}' must be a name: letters, digits, _ and -",
                    hint="Correct the name.",
                )
            assert item.section is not None
            result[name] = self.section(item.section, _table(item, node, at), f"{at}.")
        return result

    def _null(self, item: Declared, node: Node, path: str) -> None:
        # `decode:` with nothing below it was probably meant to be a pool; `decode: null` was not.
        written = isinstance(node, Scalar) and node.text != ""
        if item.optional and (written or item.section is None):
            return
        if item.section is not None or item.shape in ("environment", "free"):
            raise ConfigError(
                f"{node.origin}: key '{path}' must be a mapping, not {describe(node)}",
                hint="Indent its keys below it, write {} for its defaults, or remove the line.",
            )
        raise _wrong(item, node, path)

    def _strings(self, item: Declared, node: Node, path: str) -> tuple[str, ...]:
        if not isinstance(node, Items):
            raise _wrong(item, node, path)
        result: list[str] = []
        for number, value in enumerate(node.values):
            at = f"{path}[{number}]"
            self._origins[at] = value.origin
            if not isinstance(value, Scalar) or _is_null(value):
                raise _wrong(item, value, at, expected="text")
            result.append(_text(item, value, at))
        return tuple(result)

    def _environment(self, table: Table, path: str) -> dict[str, str]:
        result: dict[str, str] = {}
        for name, node in table.entries.items():
            at = f"{path}.{name}"
            self._origins[at] = node.origin
            if not VARIABLE.fullmatch(name):
                raise ConfigError(
                    f"{node.origin}: key '{at}' must be a variable's name: letters, digits and _, "
                    "not starting with a digit",
                    hint="Correct the name.",
                )
            if not isinstance(node, Scalar) or (node.plain and (_is_null(node) or node.text in _BOOLEAN)):
                raise ConfigError(
                    f"{node.origin}: key '{at}' must be text or a number, not {describe(node)}",
                    hint='Put the value in quotes; an empty one is "".',
                )
            result[name] = node.text
        return result

    def _free_table(self, table: Table, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, node in table.entries.items():
            at = f"{path}.{name}"
            if not name:
                raise ConfigError(f"{node.origin}: key '{path}' has an empty key", hint="Name it.")
            self._origins[at] = node.origin
            result[name] = self._free(node, at)
        return result

    def _free(self, node: Node, path: str) -> Any:
        if isinstance(node, Table):
            return self._free_table(node, path)
        if isinstance(node, Items):
            return [self._free(value, f"{path}[{number}]") for number, value in enumerate(node.values)]
        if not node.plain:
            return node.text
        if node.text in _NULL:
            return None
        if node.text in _BOOLEAN:
            return _BOOLEAN[node.text]
        if _AMBIGUOUS.fullmatch(node.text):
            raise ConfigError(
                f"{node.origin}: key '{path}' has the value {node.text}, which YAML readers disagree on",
                hint=f"Write true, false or a decimal number, or '{node.text}' in quotes if it is text.",
            )
        if _INTEGER.fullmatch(node.text):
            return _integer(node, path)
        if _NUMBER.fullmatch(node.text):
            return _number(node, path)
        return node.text


def _table(item: Declared, node: Node, path: str) -> Table:
    if not isinstance(node, Table):
        raise _wrong(item, node, path)
    return node


_EXPECTED = {
    "text": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "strings": "a list of texts",
    "environment": "a mapping",
    "free": "a mapping",
    "section": "a mapping",
    "sections": "a mapping",
}


def _wrong(item: Declared, node: Node, path: str, expected: str | None = None) -> ConfigError:
    if expected is None and item.choices:
        expected = f"one of {', '.join(item.choices)}"
    elif expected is None and item.info.kind == "duration":
        expected = f"seconds, {FORMS}"
    return ConfigError(
        f"{node.origin}: key '{path}' must be {expected or _EXPECTED[item.shape]}, not {describe(node)}",
        hint=_remedy(item, node, text=expected == "text" or item.shape == "text"),
    )


def _remedy(item: Declared, node: Node, *, text: bool) -> str:
    """`text`: the value should have been text, alone or in a list."""
    if isinstance(node, Scalar) and not _is_null(node):
        if item.choices:
            close = nearest(node.text, item.choices)
            return f"Did you mean '{close}'?" if close else item.info.doc
        if item.info.kind == "duration":
            return "For four hours write 14400 or 04:00:00."
        if text:
            return f'Put the value in quotes: "{node.text}".'
        if item.shape in ("integer", "number") and not node.plain and _NUMBER.fullmatch(node.text):
            return "Remove the quotes."
        if item.shape == "integer" and _AMBIGUOUS.fullmatch(node.text):
            return "Write a decimal number without leading zeros, colons or underscores."
        if item.shape == "strings":
            return f"Put it in brackets: [{node.text}]."
    return item.info.doc


def _scalar(item: Declared, node: Scalar, path: str) -> str | int | float | bool:
    if item.shape == "boolean":
        if not node.plain or node.text not in _BOOLEAN:
            raise _wrong(item, node, path)
        return _BOOLEAN[node.text]
    if item.info.kind == "duration":
        return _in_range(item, node, path, _duration(item, node, path))
    if item.shape == "integer":
        if not node.plain or not _INTEGER.fullmatch(node.text):
            raise _wrong(item, node, path)
        return _in_range(item, node, path, _integer(node, path))
    if item.shape == "number":
        if not node.plain or not _NUMBER.fullmatch(node.text):
            raise _wrong(item, node, path)
        return _in_range(item, node, path, _number(node, path))
    return _text(item, node, path)


def _duration(item: Declared, node: Scalar, path: str) -> int:
    if node.plain and _INTEGER.fullmatch(node.text):
        return _integer(node, path)
    seconds = clock_seconds(node.text)
    if seconds is None:
        raise _wrong(item, node, path)
    return seconds


def _integer(node: Scalar, path: str) -> int:
    if len(node.text) > _MAX_DIGITS:
        raise ConfigError(
            f"{node.origin}: key '{path}' has more than {_MAX_DIGITS} digits", hint="Write a smaller number."
        )
    return int(node.text)


def _number(node: Scalar, path: str) -> float:
    value = float(node.text)
    if not math.isfinite(value):
        raise ConfigError(
            f"{node.origin}: key '{path}' must be a finite number, not {node.text}",
            hint="Write a smaller number.",
        )
    return value


def _in_range(item: Declared, node: Scalar, path: str, value: float) -> float:
    low, high = item.info.minimum, item.info.maximum
    if (low is None or value >= low) and (high is None or value <= high):
        return value
    if low is not None and high is not None:
        limits = f"from {low} to {high}"
    else:
        limits = f"at least {low}" if low is not None else f"at most {high}"
    unit = " seconds" if item.info.kind == "duration" else ""
    raise ConfigError(
        f"{node.origin}: key '{path}' must be {limits}{unit}, not {node.text}", hint=item.info.doc
    )


def _text(item: Declared, node: Scalar, path: str) -> str:
    if item.choices:
        if node.text not in item.choices:
            raise _wrong(item, node, path)
        return node.text
    if node.plain and (_NUMBER.fullmatch(node.text) or node.text in _BOOLEAN):
        raise _wrong(item, node, path, expected="text")
    pattern = item.info.pattern
    if pattern is not None and not re.fullmatch(pattern, node.text):
        raise ConfigError(
            f"{node.origin}: key '{path}' must match {pattern}, not {node.text!r}", hint=item.info.doc
        )
    if node.text == "" and item.default != "":
        raise ConfigError(f"{node.origin}: key '{path}' must not be empty", hint=item.info.doc)
    # A line break in a partition's name would begin a new line of the job script.
    if item.info.kind != "text" and not node.text.isprintable():
        raise ConfigError(
            f"{node.origin}: key '{path}' must be one line of printable characters, not {node.text!r}",
            hint="Remove the line break or control character.",
        )
    return node.text


def _either(words: Iterable[str]) -> str:
    *first, last = (f"'{word}'" for word in words)
    return f"{', '.join(first)} or {last}" if first else last
