"""CSV with a header (RFC 4180), and the same with tabs. All values are text, as written.

Empty lines are no rows. A row has as many fields as the header: where it has not, a comma or a quote is
amiss, and to fill up or to cut off would put values into the wrong columns.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from ...errors import ConfigError
from .lines import MAX_LINE, lines, text

DELIMITERS = {"csv": ",", "tsv": "\t"}


def header(path: str, name: str, delimiter: str) -> tuple[str, ...]:
    """The columns' names. Raises ConfigError."""
    for _, fields in _records(path, name, delimiter):
        return _checked_header(fields, name)
    raise ConfigError(f"{name}: no header", hint="Name the columns in the first line.")


def read(path: str, name: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and rows of `path`, which errors call `name`. Raises ConfigError."""
    columns: tuple[str, ...] = ()
    for number, fields in _records(path, name, delimiter):
        if not columns:
            columns = _checked_header(fields, name)
            continue
        if len(fields) != len(columns):
            raise ConfigError(
                f"{name}:{number}: the row has {_count(len(fields), 'field')}, "
                f"the header {_count(len(columns), 'column')}",
                hint="Put fields with commas, quotes or line breaks in quotes."
                if len(fields) > len(columns)
                else "Write empty fields, too.",
            )
        yield f"{name}:{number}", dict(zip(columns, fields, strict=True))


def _checked_header(fields: list[str], name: str) -> tuple[str, ...]:
    for index, column in enumerate(fields):
        if not column.strip():
            raise ConfigError(
                f"{name}: the header has no name for column {index + 1} of {len(fields)}",
                hint="Name all columns in the first line.",
            )
        if column in fields[:index]:
            raise ConfigError(
                f"{name}: the header has the column '{column}' twice", hint="Rename one of them."
            )
    return tuple(fields)


def _records(path: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not empty, with the numbers of their first lines."""
    # Is one for all of the process; the package's own, 128 KiB, is less than a long document.
    csv.field_size_limit(MAX_LINE)
    decoded = (text(line, name, number) for number, line in lines(path, name))
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _broken(error, name, first) from None
        if fields is None:
            return
        if fields:
            yield first, fields


def _broken(error: csv.Error, name: str, number: int) -> ConfigError:
    message = str(error)
    if "unexpected end of data" in message or "field larger" in message:
        return ConfigError(
            f"{name}:{number}: the row has a quote that is not closed",
            hint="Close it, or write a quote inside of quotes twice.",
        )
    if "new-line character" in message:
        return ConfigError(
            f"{name}:{number}: lines end with a carriage return alone",
            hint="Convert the file, for example with `mac2unix`.",
        )
    return ConfigError(
        f"{name}:{number}: broken CSV: {message}",
        hint="Put fields with quotes in quotes, and write each quote inside twice.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
