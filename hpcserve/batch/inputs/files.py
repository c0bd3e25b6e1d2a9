"""The input of a run: its files, and their rows in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import xxhash

from ...errors import ConfigError
from . import arrow, csv, jsonl
from .columns import columns_of
from .custom_ids import CustomIds, first_duplicate
from .formats import Format
from .lines import unreadable
from .openai_lines import Kind, check_kind, custom_id, kind_of
from .patterns import Found, find
from .rows import Row

if TYPE_CHECKING:
    import pyarrow

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    path: str
    """Absolute."""
    format: Format
    size: int
    """Bytes."""
    mtime_ns: int
    digest: str
    """xxh3_128 of the file's bytes, in hexadecimal."""
    rows: int | None
    """None where only reading the whole file tells."""


class Inputs:
    """Files that were looked into, not read through; see `checked_rows`."""

    def __init__(
        self,
        files: Sequence[InputFile],
        names: Sequence[str],
        *,
        kind: Kind,
        columns: tuple[str, ...] | None,
        schema: pyarrow.Schema | None,
    ) -> None:
        self.files = tuple(files)
        self._names = tuple(names)
        """What errors call the files."""
        self.kind: Kind = kind
        self.columns = columns
        """Of CSV, Parquet and Arrow; in JSON Lines each row has its own."""
        self.schema = schema
        """Of Parquet and Arrow, without metadata."""

    def rows(self) -> Iterator[Row]:
        """All rows, in memory for a few at a time; may be called again.

        What can't be read raises ConfigError; else nothing is verified, not even that the files are
        still the same.
        """
        number = 0
        for file, name in zip(self.files, self._names, strict=True):
            for place, columns in _read(file.path, name, file.format):
                yield Row(number, place, columns)
                number += 1

    def checked_rows(self) -> Iterator[Row]:
        """`rows()` for planning: raises ConfigError for all that is wrong with the rows of these files.

        At the end, duplicate custom_ids are looked for (24 to 32 bytes a row, until it is over), and
        `files` have got their `rows`.
        """
        ids = CustomIds()
        number = 0
        first = ""
        counts: list[int] = []
        for file, name in zip(self.files, self._names, strict=True):
            before = number
            for place, columns in _read(file.path, name, file.format):
                first = first or place
                if file.format == "jsonl":
                    check_kind(columns, place, self.kind, first)
                if self.kind == "openai":
                    ids.add(custom_id(columns, place))
                yield Row(number, place, columns)
                number += 1
            counts.append(number - before)
            if counts[-1] == 0:
                raise _no_rows(name)
        self._check_unique(ids)
        self.files = tuple(replace(file, rows=rows) for file, rows in zip(self.files, counts, strict=True))

    def _check_unique(self, ids: CustomIds) -> None:
        for suspects in ids.suspects():
            duplicate = first_duplicate((row.columns["custom_id"] for row in self.rows()), suspects)
            if duplicate is not None:
                places = {
                    row.number: row.place
                    for row in self.rows()
                    if row.number in (duplicate.before, duplicate.row)
                }
                raise ConfigError(
                    f"{places[duplicate.row]}: custom_id '{duplicate.custom_id}' is that of "
                    f"{places[duplicate.before]}",
                    hint="Answers are found by custom_id, so each must be there once.",
                )


def open_inputs(patterns: Sequence[str], *, known: Iterable[InputFile] = ()) -> Inputs:
    """The files that paths and patterns name, with what can be told by their first rows and footers.

    Each file is read once for its digest, unless it is in `known`, with this path, size and time of
    change. Raises ConfigError.
    """
    found = find(patterns)
    columns = columns_of(found)
    kind = _kind(found)
    earlier = {(file.path, file.size, file.mtime_ns): file for file in known}
    files = []
    for file in found:
        key = (file.path, file.status.st_size, file.status.st_mtime_ns)
        files.append(earlier.get(key) or _input_file(file))
    names = [file.name for file in found]
    return Inputs(files, names, kind=kind, columns=columns.names, schema=columns.schema)


def _input_file(found: Found) -> InputFile:
    return InputFile(
        path=found.path,
        format=found.format,
        size=found.status.st_size,
        mtime_ns=found.status.st_mtime_ns,
        digest=_digest(found),
        rows=arrow.count(found.path, found.name) if found.format == "parquet" else None,
    )


def _digest(found: Found) -> str:
    digest = xxhash.xxh3_128()
    size = 0
    try:
        with open(found.path, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise unreadable(found.name, error) from error
    if (size, status.st_mtime_ns) != (found.status.st_size, found.status.st_mtime_ns):
        raise ConfigError(
            f"{found.name}: the file was changed while it was read", hint="Wait until it is written."
        )
    return digest.hexdigest()


def _kind(files: Iterable[Found]) -> Kind:
    """By the first row of each file. Raises ConfigError for two kinds, and for a file without rows."""
    kind: Kind | None = None
    first = ""
    for file in files:
        place, columns = next(_read(file.path, file.name, file.format), (None, {}))
        if place is None:
            raise _no_rows(file.name)
        if file.format != "jsonl":
            kind = "rows"
        elif kind is None:
            kind, first = kind_of(columns), place
        else:
            check_kind(columns, place, kind, first)
    return kind or "rows"


def _no_rows(name: str) -> ConfigError:
    return ConfigError(f"{name}: the file has no rows", hint="Leave it out, or make it again.")


def _read(path: str, name: str, format: Format) -> Iterator[tuple[str, dict[str, Any]]]:
    if format == "jsonl":
        return jsonl.read(path, name)
    if format in csv.DELIMITERS:
        return csv.read(path, name, csv.DELIMITERS[format])
    return arrow.read(path, name, format)
