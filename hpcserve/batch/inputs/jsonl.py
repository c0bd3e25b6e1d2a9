"""JSON Lines: one object a line. Lines of white space only are no rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec

from ...errors import ConfigError
from .lines import lines, text

_DECODER = msgspec.json.Decoder()


def read(path: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and rows of `path`, which errors call `name`. Raises ConfigError."""
    for number, line in lines(path, name):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _broken(line, name, number) from None
        if not isinstance(value, dict):
            raise ConfigError(
                f"{name}:{number}: the line must be a JSON object, not {_describe(value)}",
                hint="Write one object a line; `jq -c '.[]'` makes lines of an array.",
            )
        yield f"{name}:{number}", value


def _broken(line: bytes, name: str, number: int) -> ConfigError:
    """What is wrong with a line, in more words than the quick decoder has."""
    place = f"{name}:{number}"
    content = text(line, name, number)
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except _NoConstant as error:
        return ConfigError(
            f"{place}: broken JSON: {error} is no JSON value",
            hint="Write null for numbers that are not there.",
        )
    except json.JSONDecodeError as error:
        if number == 1 and content.lstrip().startswith("["):
            return ConfigError(
                f"{place}: a JSON array over several lines, not JSON Lines",
                hint="Make lines of it with `jq -c '.[]'`.",
            )
        return ConfigError(
            f"{place}: broken JSON: {error.msg} (column {error.colno})",
            hint="Correct the line."
            if line.endswith(b"\n")
            else "The file ends with this line; was it cut off?",
        )
    except RecursionError:
        return ConfigError(f"{place}: broken JSON: nested too deep", hint="Correct the line.")
    cause = (
        "a number is too large for JSON readers"
        if _has_infinity(value)
        else "a text has half of a surrogate pair (\\ud800 to \\udfff), which UTF-8 can't hold"
    )
    return ConfigError(f"{place}: broken JSON: {cause}", hint="Correct the line.")


class _NoConstant(Exception):
    pass


def _refuse_constant(word: str) -> None:
    raise _NoConstant(word)


def _has_infinity(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_infinity(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_infinity(item) for item in value)
    return isinstance(value, float) and math.isinf(value)


def _describe(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return {"list": "an array", "str": "a text"}.get(type(value).__name__, "a number")
