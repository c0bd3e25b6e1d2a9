"""Jinja2 templates of prompts, rendered with the columns of a row.

A column is a variable; one whose name is none is `row["its name"]`. Templates are sandboxed, and can't load
other templates. What would quietly spoil a prompt is an error: a variable that is undefined, and a null or
binary value that is printed. `tojson` writes plain JSON, not that for HTML. The line break at the very
end of a template is not part of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..config.load import nearest
from ..errors import ConfigError
from .inputs.rows import RowError

ROW = "row"
"""The variable that has all columns, unless a column has this name."""

_LOADING = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Template:
    def __init__(self, source: str, name: str) -> None:
        """`name` is what errors call it. Raises ConfigError."""
        self._name = name
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{name}, line {error.lineno}: {error.message}", hint="Correct the Jinja2 template."
            ) from None
        for node in tree.find_all(_LOADING):
            raise ConfigError(
                f"{name}, line {node.lineno}: templates can't load other templates",
                hint="Write the text into this one.",
            )
        self._variables = meta.find_undeclared_variables(tree) - environment.globals.keys() - {ROW}

    def render(self, columns: Mapping[str, Any]) -> str:
        """Raises RowError."""
        try:
            return self._template.render({ROW: columns} | dict(columns))
        except jinja2.UndefinedError as error:
            raise RowError(f"{self._name}: {error}{self._advice(str(error), columns)}") from None
        except _Unprintable as error:
            raise RowError(f"{self._name}: {error}{self._nulls(columns)}") from None
        except Exception as error:  # whatever the template's own calls and operators raise
            raise RowError(f"{self._name}: {type(error).__name__}: {error}") from None

    def _advice(self, message: str, columns: Mapping[str, Any]) -> str:
        for name in self._variables - columns.keys():
            if f"'{name}'" in message:
                return f"; {column_advice(name, columns)}"
        return ""

    def _nulls(self, columns: Mapping[str, Any]) -> str:
        nulls = sorted(name for name in self._variables & columns.keys() if columns[name] is None)
        return f"; null in this row: {', '.join(nulls)}" if nulls else ""


def column_advice(name: str, columns: Mapping[str, Any]) -> str:
    """For a column that is not there: which one may be meant."""
    near = nearest(name, columns)
    return f"did you mean '{near}'?" if near else f"the row has: {', '.join(columns) or 'no columns'}"


class _Unprintable(Exception):
    pass


def _printable(value: Any) -> Any:
    if value is None:
        raise _Unprintable("a null is printed; where a value may be missing, write {{ name or '' }}")
    if isinstance(value, bytes):
        raise _Unprintable("binary data is printed")
    return value


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_printable)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
