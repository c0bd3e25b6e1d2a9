"""Which columns files have, and whether these are the same in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ...config.load import nearest
from ...errors import ConfigError
from . import arrow, csv
from .extras import need
from .formats import FAMILIES
from .patterns import Found

if TYPE_CHECKING:
    import pyarrow


class Columns(NamedTuple):
    names: tuple[str, ...] | None
    """None: JSON Lines, where each row has its own."""
    schema: pyarrow.Schema | None
    """Of Parquet and Arrow files only."""


def columns_of(files: Iterable[Found]) -> Columns:
    """Raises ConfigError for files that can't be read together."""
    first, *others = files
    for other in others:
        if FAMILIES[other.format] != FAMILIES[first.format]:
            raise ConfigError(
                f"{other.name}: {FAMILIES[other.format]}, but {first.name} is {FAMILIES[first.format]}: "
                "the files of one run must be of one kind",
                hint="Convert them, or run them apart.",
            )
    if first.format == "jsonl":
        return Columns(None, None)
    if first.format in csv.DELIMITERS:
        names = _header(first)
        for other in others:
            _check_names(first, names, other, _header(other))
        return Columns(names, None)
    schema = _schema(first)
    for other in others:
        schema = _merged(first, schema, other, _schema(other))
    return Columns(tuple(schema.names), schema)


def _header(file: Found) -> tuple[str, ...]:
    return csv.header(file.path, file.name, csv.DELIMITERS[file.format])


def _schema(file: Found) -> pyarrow.Schema:
    schema = arrow.schema(file.path, file.name, file.format)
    for index, column in enumerate(schema.names):
        if column in schema.names[:index]:
            raise ConfigError(
                f"{file.name}: the column '{column}' is there twice", hint="Rename one of them."
            )
    return schema


def _check_names(first: Found, names: Iterable[str], other: Found, others: Iterable[str]) -> None:
    for column in others:
        if column not in names:
            near = nearest(column, names)
            raise ConfigError(
                f"{other.name}: the column '{column}' is not in {first.name}",
                hint=f"Did you mean '{near}'?"
                if near
                else "All files of one run must have the same columns.",
            )
    for column in names:
        if column not in others:
            raise ConfigError(
                f"{other.name}: the column '{column}' of {first.name} is missing",
                hint="All files of one run must have the same columns.",
            )


def _merged(first: Found, schema: pyarrow.Schema, other: Found, others: pyarrow.Schema) -> pyarrow.Schema:
    """`schema`, where a column in which nothing was known to be has got the type of the other file."""
    _check_names(first, schema.names, other, others.names)
    types = need("pyarrow", "reading Arrow").types
    for index, field in enumerate(schema):
        type_ = others.field(field.name).type
        if types.is_null(field.type) or (types.is_string(field.type) and types.is_large_string(type_)):
            schema = schema.set(index, field.with_type(type_))
        elif not (
            type_ == field.type
            or types.is_null(type_)
            or (types.is_large_string(field.type) and types.is_string(type_))
        ):
            raise ConfigError(
                f"{other.name}: the column '{field.name}' is {type_}, but in {first.name} it is {field.type}",
                hint="Convert one of them, or run them apart.",
            )
    return schema
