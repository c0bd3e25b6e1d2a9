"""Types of a table's columns: inferred from values, and widened where later values need it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from .text import json_text, whole_characters

VECTOR = pa.list_(pa.float32())
"""Of an embedding; its values are arrays of floats."""
JSON_TEXT = {b"hpcserve.json": b"1"}
"""Metadata of a column whose cells are JSON text, as no type of Arrow holds all of its values."""
MOST_FIELDS = 128
"""In an object with more fields the names are data; as JSON text it has one column, not thousands."""

_UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)


def inferred(values: Sequence[Any]) -> pa.DataType | None:
    """The type that holds all of these; None: there is none but JSON text."""
    vectors = [isinstance(value, array) for value in values if value is not None]
    if any(vectors):
        return VECTOR if all(vectors) else None
    try:
        found = pa.infer_type(values)
    except _UNFIT:
        return None
    return found if _storable(found) else None


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds what both hold; None: there is none but JSON text."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = merged(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            both = merged(fields.get(field.name, pa.null()), field.type)
            if both is None:
                return None
            fields[field.name] = both
        return pa.struct(list(fields.items())) if len(fields) <= MOST_FIELDS else None
    return None


def _storable(kind: pa.DataType) -> bool:
    """Parquet has no objects without fields."""
    if pa.types.is_struct(kind):
        return 0 < kind.num_fields <= MOST_FIELDS and all(_storable(field.type) for field in kind)
    return _storable(kind.value_type) if pa.types.is_list(kind) else True


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array | None:
    """None: not all of the values are of this type."""
    if kind == VECTOR and any(isinstance(value, array) for value in values):
        return _vectors(values)
    for repair in (False, True):
        try:
            return pa.array([whole_characters(value) for value in values] if repair else values, type=kind)
        except UnicodeEncodeError:
            continue
        except _UNFIT:
            return None
    return None


def _vectors(values: Sequence[array[float] | None]) -> pa.Array | None:
    if not all(value is None or isinstance(value, array) for value in values):
        return None
    flat = array("f")
    ends = [0]
    for value in values:
        if value is not None:
            flat.extend(value)
        ends.append(len(flat))
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()),
        pa.Array.from_buffers(pa.float32(), len(flat), [None, pa.py_buffer(flat)]),
        mask=pa.array([value is None for value in values]),
    )


def is_json_text(field: pa.Field) -> bool:
    return JSON_TEXT.keys() <= (field.metadata or {}).keys()


def texts(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if value is None else json_text(value) for value in values], type=pa.string())
