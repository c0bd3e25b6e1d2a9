"""YAML text as a tree in which every value knows its `FILE:LINE`.

The tree is built from PyYAML's events, not from its values: PyYAML reads YAML 1.1, where `no` is
false, `010` is eight and `12:30:00` is 45000. Here a plain scalar stays the text that was written,
and `load.py` reads it by the type of its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import yaml

from ..errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Counts what aliases stand for, so that a few lines of them can't fill the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    text: str
    plain: bool
    """Written without quotes and not as a block."""
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    values: tuple[Node, ...]
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    entries: Mapping[str, Node]
    """A value's `origin` is the line of its key."""
    origin: str


Node: TypeAlias = Scalar | Items | Table

_Locate: TypeAlias = Callable[[int], str]
"""Line number, from 1, to origin."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: Path, *, what: str) -> str:
    """The file's text. `what` names the kind of file in errors. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = (
            "The least one is a line `model: ORG/NAME`, or `model: /a/directory/with/its/weights`."
            if what == "model.yaml"
            else "Check the path."
        )
        raise ConfigError(f"{path}: there is no such file ({what})", hint=hint) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: a directory, not a {what}", hint="Name the YAML file inside it."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}", hint="Check the file's owner and permissions."
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, so it is no {what}", hint="Check the path."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8 text",
            hint="Save the file as UTF-8.",
        ) from None


def parse_document(text: str, name: str) -> Table:
    """The mapping at the top of a YAML file; `name` is FILE in origins. Raises ConfigError."""
    node = _parse(text, lambda line: f"{name}:{line}")
    if node is None:
        raise ConfigError(f"{name}:1: the file is empty", hint="Write `key: value` lines.")
    if not isinstance(node, Table):
        raise ConfigError(
            f"{node.origin}: the file must be a mapping, not {describe(node)}",
            hint="Write `key: value` lines.",
        )
    return node


def parse_value(text: str, origin: str) -> Node:
    """A single YAML value, such as the right side of `--set key=value`. Raises ConfigError."""
    node = _parse(text, lambda line: origin)
    return Scalar(text="", plain=True, origin=origin) if node is None else node


def describe(node: Node) -> str:
    """What a node is, for the second half of `must be X, not …`."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    if node.plain and node.text == "":
        return "empty"
    text = node.text if len(node.text) <= 60 else node.text[:57] + "..."
    return repr(text) if node.plain else f"the text {text!r}"


def merge(base: Table, over: Table) -> Table:
    """`over` laid on `base`: mappings are merged at every depth, anything else is replaced."""
    entries = dict(base.entries)
    for key, node in over.entries.items():
        below = entries.get(key)
        if isinstance(below, Table) and isinstance(node, Table):
            entries[key] = merge(below, node)
        else:
            entries[key] = node
    return Table(entries=entries, origin=over.origin)


def _parse(text: str, locate: _Locate) -> Node | None:
    try:
        return _Builder(text, locate).document()
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, locate) from None


def _syntax_error(error: yaml.YAMLError, text: str, locate: _Locate) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a reader error: a character YAML forbids
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position if isinstance(position, int) else 0) + 1
        return ConfigError(
            f"{locate(line)}: not YAML: it has a control character", hint="Save the file as plain text."
        )
    lines = text.splitlines()
    written = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())]:
        return ConfigError(
            f"{locate(mark.line + 1)}: not YAML: the line is indented with a tab",
            hint="Indent with spaces.",
        )
    problem = getattr(error, "problem", None) or "syntax error"
    return ConfigError(
        f"{locate(mark.line + 1)}: not YAML: {problem} (column {mark.column + 1})",
        hint="Look at this line and the one before it: a colon, quote or bracket is missing or too many.",
    )


class _Builder:
    """Consumes the events of one document."""

    def __init__(self, text: str, locate: _Locate) -> None:
        self._events = yaml.parse(text, Loader=_LOADER)
        self._locate = locate
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._values = 0

    def document(self) -> Node | None:
        next(self._events)  # StreamStart
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        node = self._node(next(self._events), depth=0)
        next(self._events)  # DocumentEnd
        extra = next(self._events)
        if not isinstance(extra, yaml.StreamEndEvent):
            raise ConfigError(
                f"{self._origin(extra)}: a second document begins here",
                hint="Keep one document: remove the `---` line and what follows.",
            )
        return None if isinstance(node, Scalar) and node.plain and node.text == "" else node

    def _origin(self, event: yaml.Event) -> str:
        mark = event.start_mark
        return self._locate(mark.line + 1 if mark else 1)

    def _node(self, event: yaml.Event, depth: int) -> Node:
        origin = self._origin(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), origin)
        before = self._values
        self._count(1, origin)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{origin}: nested more than {MAX_DEPTH} deep", hint="Flatten the file.")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ConfigError(
                f"{origin}: the tag '{tag}' is not supported",
                hint="Remove it; to make a number text, put it in quotes.",
            )
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(text=event.value, plain=event.style in (None, ""), origin=origin)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._items(origin, depth)
        else:
            node = self._table(origin, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = (node, self._values - before)
        return node

    def _alias(self, anchor: str, origin: str) -> Node:
        if anchor not in self._anchors:
            raise ConfigError(
                f"{origin}: the alias '*{anchor}' has no anchor '&{anchor}' that ends before it",
                hint="Write the value out.",
            )
        node, size = self._anchors[anchor]
        self._count(size, origin)
        return node

    def _count(self, size: int, origin: str) -> None:
        self._values += size
        if self._values > MAX_VALUES:
            raise ConfigError(
                f"{origin}: more than {MAX_VALUES} values, aliases counted in full",
                hint="This is no configuration; check the file.",
            )

    def _items(self, origin: str, depth: int) -> Items:
        values: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._node(event, depth + 1))
        return Items(values=tuple(values), origin=origin)

    def _table(self, origin: str, depth: int) -> Table:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            at = self._origin(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError(f"{at}: a key must be a plain word", hint="Write `key: value`.")
            key = event.value
            if key == "<<":
                raise ConfigError(f"{at}: merge keys (`<<`) are not supported", hint="Write the keys out.")
            if key in entries:
                raise ConfigError(
                    f"{at}: key '{key}' is given twice, first at {entries[key].origin}",
                    hint="Keep one of them.",
                )
            entries[key] = replace(self._node(next(self._events), depth + 1), origin=at)
        return Table(entries=entries, origin=origin)
