"""The writer of each format of the output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..inputs.extras import need
from ..inputs.files import Inputs
from .answers import Writer
from .table import CUSTOM_ID, check_columns

OUTPUTS = ("openai", "jsonl", "parquet")


def output_name(format: str) -> str:
    """Of the file in the output directory."""
    return "output.parquet" if format == "parquet" else "output.jsonl"


def check_output(format: str, inputs: Inputs, *, samples: int) -> None:
    """Raises ConfigError where the input's columns and those of the results have a name in common, and where
    the format needs what is not installed."""
    if format == "openai":
        return
    if format == "parquet":
        need("pyarrow", "writing Parquet")
    if inputs.kind == "openai":
        check_columns((CUSTOM_ID,), samples=samples)
    elif inputs.columns is not None:
        check_columns(inputs.columns, samples=samples)


def open_writer(
    format: str,
    output: Path,
    errors: Path | None,
    *,
    inputs: Inputs,
    samples: int,
    warn: Callable[[str], None] = lambda text: None,
) -> Writer:
    """`errors` is where OpenAI's format has the rows without an answer. Raises StorageError."""
    if format == "openai":
        from .openai import OpenAIWriter

        assert errors is not None
        return OpenAIWriter(output, errors, samples=samples)
    if format == "jsonl":
        from .jsonl import JsonlWriter

        return JsonlWriter(output, samples=samples)
    from .parquet import ParquetWriter

    return ParquetWriter(output, samples=samples, schema=inputs.schema, warn=warn)
