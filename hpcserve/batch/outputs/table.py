"""Tables of results: the input's columns, then what came of each row. Failed rows are in it, with `error`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import ConfigError
from .answers import Answer
from .shown import shown

RESULTS = ("response", "reasoning", "finish_reason", "usage", "attempts", "error")
SAMPLE = "sample"
"""Only where each row has several answers."""
CUSTOM_ID = "custom_id"
"""Stands for the columns of an input that is OpenAI batch lines."""


def result_columns(samples: int) -> tuple[str, ...]:
    return RESULTS if samples == 1 else (SAMPLE, *RESULTS)


def check_columns(names: Iterable[str], *, samples: int = 1) -> None:
    """Raises ConfigError if a column of the input has the name of one that the results add.

    `names` must be those of all rows: in lines of JSON a column may come late, and would be written over.
    """
    added = result_columns(samples)
    for name in names:
        if name in added:
            raise ConfigError(
                f"the input's column '{name}' has the name of a column of the results"
                f" (these are {', '.join(added)})",
                hint="Rename it in the input, or keep other columns only, or write OpenAI's batch lines.",
            )


def table_row(answer: Answer, *, samples: int) -> dict[str, Any]:
    """Column -> value; vectors of embeddings are arrays of floats."""
    row: dict[str, Any] = {}
    if answer.custom_id is not None:
        row[CUSTOM_ID] = answer.custom_id
    row.update(answer.columns or {})
    if samples > 1:
        row[SAMPLE] = answer.sample
    cells = shown(answer)
    row["response"] = cells.response
    row["reasoning"] = cells.reasoning
    row["finish_reason"] = cells.finish_reason
    row["usage"] = cells.usage
    row["attempts"] = answer.attempts
    row["error"] = cells.error
    return row
