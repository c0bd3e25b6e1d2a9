"""A table in Parquet, in row groups of bounded size.

The types of the input's columns are those of its schema if it has one, else inferred from the first row
group. A later value that does not fit widens its column: the file so far is written again, group by group,
with the wider type, which is JSON text where no other holds all values. That costs one pass over the file,
and a column can be widened a few times at most; a type that was wrong at row 9 million costs no row.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from .answers import Answer
from .column_types import JSON_TEXT, column, inferred, is_json_text, merged, texts
from .file import OutputFile
from .table import SAMPLE, result_columns, table_row
from .text import json_bytes, whole_characters

GROUP_ROWS = 16_384
GROUP_BYTES = 64 << 20
"""Of text and vectors in a row group: what is held in memory, some times over."""

_RESULT_TYPES = {
    SAMPLE: pa.int32(),
    "reasoning": pa.string(),
    "finish_reason": pa.string(),
    "usage": pa.struct(
        [("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64()), ("cached_tokens", pa.int64())]
    ),
    "attempts": pa.int32(),
    "error": pa.string(),
}


class ParquetWriter:
    """`schema`: that of the input's columns. `warn` gets a sentence when a column becomes JSON text."""

    def __init__(
        self,
        path: Path,
        *,
        samples: int = 1,
        schema: pa.Schema | None = None,
        warn: Callable[[str], None] = lambda text: None,
        group_rows: int = GROUP_ROWS,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self._samples = samples
        self._warn = warn
        self._group_rows, self._group_bytes = group_rows, group_bytes
        self._results = result_columns(samples)
        self._types = {name: _RESULT_TYPES[name] for name in self._results if name in _RESULT_TYPES}
        self._types |= {field.name: field.type for field in schema or ()}
        self._declared = set(self._types)
        """Columns whose type is tried as it is, before any is inferred."""
        self._names = [field.name for field in schema or ()]
        """Of columns of the input, in their order."""
        self._texts: set[str] = set()
        """Columns of JSON text."""
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._written = 0
        self._file = OutputFile(path)
        self._parquet: pq.ParquetWriter | None = None

    def write(self, answer: Answer) -> None:
        self.write_row(table_row(answer, samples=self._samples))

    def write_row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += sum(_size(value) for value in row.values())
        if len(self._rows) >= self._group_rows or self._bytes >= self._group_bytes:
            self._flush()

    def close(self) -> None:
        if self._file.file.closed:
            return
        if self._rows or self._parquet is None:
            self._flush(last=True)
        try:
            if self._parquet is not None:
                self._parquet.close()
        except OSError as error:
            raise self._file.failed(error) from error
        self._file.close()

    def _flush(self, *, last: bool = False) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        known = {*self._names, *self._results}
        for row in rows:
            if row.keys() - known:
                for name in [name for name in row if name != whole_characters(name)]:
                    row[whole_characters(name)] = row.pop(name)
                new = [name for name in row if name not in known]
                self._names += new
                known.update(new)
        columns = {
            name: self._column(name, [row.get(name) for row in rows])
            for name in (*self._names, *self._results)
        }
        if last and self._parquet is None:
            for name, cells in columns.items():
                if pa.types.is_null(cells.type):  # a column without any value
                    columns[name], self._types[name] = cells.cast(pa.string()), pa.string()
        try:
            if self._parquet is None:
                self._parquet = self._opened(self._schema())
            elif not self._parquet.schema.equals(self._schema(), check_metadata=True):
                self._parquet = self._rewritten(self._parquet)
                for name, cells in columns.items():
                    if name in self._texts and cells.type != pa.string():
                        columns[name] = texts([row.get(name) for row in rows])
            if rows:
                table = pa.Table.from_arrays(list(columns.values()), schema=self._schema())
                self._parquet.write_table(table, row_group_size=len(rows))
        except OSError as error:
            raise self._file.failed(error) from error
        self._written += len(rows)

    def _opened(self, schema: pa.Schema) -> pq.ParquetWriter:
        return pq.ParquetWriter(self._file.file, schema, compression="zstd")

    def _schema(self) -> pa.Schema:
        return pa.schema(
            pa.field(name, self._types[name], metadata=JSON_TEXT if name in self._texts else None)
            for name in (*self._names, *self._results)
        )

    def _column(self, name: str, values: list[Any]) -> pa.Array:
        """The cells, with a type that is wider than before if it must be."""
        if name in self._texts:
            return texts(values)
        known = self._types.get(name)
        if name in self._declared:
            cells = column(values, known)
            if cells is not None:
                return cells
            self._declared.discard(name)
            if not self._written:
                known = None  # nothing is written as this type yet
        kind = inferred(values)
        if kind is not None and known is not None:
            kind = merged(known, kind)
        cells = None if kind is None else column(values, kind)
        if cells is None:
            self._make_text(name, self._written + len(values))
            return texts(values)
        self._types[name] = kind
        return cells

    def _make_text(self, name: str, rows: int) -> None:
        self._texts.add(name)
        self._types[name] = pa.string()
        self._warn(
            f"column '{name}' has values that no one type holds, among the first {rows} rows:"
            " all of it is written as JSON text"
        )

    def _rewritten(self, parquet: pq.ParquetWriter) -> pq.ParquetWriter:
        """A writer of the same file with the wider schema, and all rows so far in it."""
        path = self._file.path
        before = path.with_name(f"{path.name}.narrow")
        parquet.close()
        self._file.abandon()
        os.replace(path, before)
        try:
            with pq.ParquetFile(before) as file:
                while True:
                    self._file = OutputFile(path)
                    writer = self._opened(self._schema())
                    unfit = self._copy(file, writer)
                    if unfit is None:
                        return writer
                    # Integers too large for the floats that came later, for one.
                    self._make_text(unfit, self._written)
                    self._abandon(writer)
        finally:
            before.unlink(missing_ok=True)

    def _copy(self, file: pq.ParquetFile, writer: pq.ParquetWriter) -> str | None:
        """Write all rows of a file. The name of a column whose values do not fit its type, if one is."""
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            columns = []
            for field in writer.schema:
                cells = _recast(table, field)
                if cells is None:
                    return str(field.name)
                columns.append(cells)
            whole = pa.Table.from_arrays(columns, schema=writer.schema)
            writer.write_table(whole, row_group_size=len(whole))
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(self._parquet)

    def _abandon(self, parquet: pq.ParquetWriter | None) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            if parquet is not None:
                parquet.close()  # or it would try when it is collected, without a file
        self._file.abandon()


def _recast(table: pa.Table, field: pa.Field) -> pa.Array | pa.ChunkedArray | None:
    """A column of rows that are written already, with a wider type; None: it does not hold them."""
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    cells = table.column(field.name)
    if is_json_text(field):
        return cells if is_json_text(table.schema.field(field.name)) else texts(cells.to_pylist())
    return cells if cells.type == field.type else column(cells.to_pylist(), field.type)


def _size(value: Any) -> int:
    """Bytes in memory, about."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, array):
        return 4 * len(value)
    return len(json_bytes(value)) if isinstance(value, dict | list) else 8
