"""JSON text of whatever a row may hold. A value is never the reason to stop at row 9 million."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec


def json_bytes(value: Any) -> bytes:
    """In one line. Floats that JSON has not are null, bytes are base64, what has no form of its own is text.

    Halves of surrogate pairs, which JSON can say and UTF-8 can not, are U+FFFD.
    """
    try:
        return msgspec.json.encode(value, enc_hook=_otherwise)
    except UnicodeEncodeError:
        return msgspec.json.encode(whole_characters(value), enc_hook=_otherwise)


def json_text(value: Any) -> str:
    return json_bytes(value).decode()


def whole_characters(value: Any) -> Any:
    """The same without halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {whole_characters(name): whole_characters(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [whole_characters(inner) for inner in value]
    return value


def _otherwise(value: object) -> object:
    return list(value) if isinstance(value, array) else str(value)
