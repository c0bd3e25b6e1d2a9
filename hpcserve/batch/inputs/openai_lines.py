"""Which rows are lines of an OpenAI batch file, and what these have to be.

A line is {"custom_id": TEXT, "method": "POST", "url": "/v1/chat/completions", "body": {…}}
(https://platform.openai.com/docs/guides/batch). What its request has to be is told by prompts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...errors import ConfigError

Kind = Literal["openai", "rows"]

MEMBERS = frozenset({"custom_id", "method", "url", "body"})


def kind_of(columns: Mapping[str, Any]) -> Kind:
    """Three of the four members make an OpenAI line: of one that lacks the fourth, this is the news."""
    return "openai" if len(MEMBERS & columns.keys()) >= 3 else "rows"


def check_kind(columns: Mapping[str, Any], place: str, kind: Kind, first: str) -> None:
    """Raises ConfigError for a row that is not like the one at `first`, which has this kind."""
    if kind_of(columns) != kind:
        what = "no OpenAI batch line" if kind == "openai" else "an OpenAI batch line"
        raise ConfigError(
            f"{place}: {what}, but {first} is {'one' if kind == 'openai' else 'none'}",
            hint="Such a line has custom_id, method, url and body. Run requests and plain rows apart.",
        )


def custom_id(columns: Mapping[str, Any], place: str) -> str:
    """Raises ConfigError."""
    value = columns.get("custom_id")
    if not isinstance(value, str) or not value:
        what = "is missing" if "custom_id" not in columns else "must be a text that is not empty"
        raise ConfigError(f"{place}: custom_id {what}", hint="Name each line; the answer has the same name.")
    return value
