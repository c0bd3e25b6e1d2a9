"""Parquet, and Arrow's IPC format as a file or as a stream, by pyarrow.

Values are Python's: structs are dicts, lists lists, timestamps datetimes, binary bytes, missing values None.

IPC format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from .extras import need
from .formats import Format
from .lines import unreadable

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 8 << 20
"""About so much of a Parquet file is decoded at once."""
BATCH_ROWS = 1024
"""So many rows at most are Python values at once."""

_READ_BYTES = 1 << 20
_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
_CONTINUES = b"\xff\xff\xff\xff"
"""Begins each message of a stream, except before Arrow 0.15."""
_ENDS = b"\0\0\0\0"
"""A message of no length: the end of the stream."""


def schema(path: str, name: str, format: Format) -> pyarrow.Schema:
    """The columns of `path`, without metadata. Raises ConfigError."""
    with _complaints(name, format):
        if format == "parquet":
            with _parquet_file(path, name) as file:
                return file.schema_arrow.remove_metadata()
        return _ipc_reader(_mapped(path), name).schema.remove_metadata()


def count(path: str, name: str) -> int:
    """Rows of a Parquet file, by its footer. Raises ConfigError."""
    with _complaints(name, "parquet"), _parquet_file(path, name) as file:
        return int(file.metadata.num_rows)


def read(path: str, name: str, format: Format) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and rows of `path`, which errors call `name`. Raises ConfigError."""
    number = 0
    with _complaints(name, format):
        for batch in _parquet_batches(path, name) if format == "parquet" else _ipc_batches(path, name):
            for columns in _values(batch, name, number):
                yield f"{name} row {number}", columns
                number += 1


def _parquet_file(path: str, name: str) -> Any:
    parquet = need("pyarrow.parquet", f"{name}: reading Parquet")
    # Buffered, not whole columns: a row group can be as large as the file.
    return parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)


def _parquet_batches(path: str, name: str) -> Iterator[pyarrow.RecordBatch]:
    with _parquet_file(path, name) as file:
        metadata = file.metadata
        size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        rows = BATCH_BYTES * metadata.num_rows // max(size, 1)
        yield from file.iter_batches(batch_size=min(max(rows, 1), BATCH_ROWS))


def _mapped(path: str) -> mmap.mmap:
    """The file, not read: some writers make one batch of millions of rows.

    It is unmapped when nothing refers to it any more, as pyarrow's buffers do.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _ipc_reader(content: mmap.mmap, name: str) -> Any:
    ipc = need("pyarrow.ipc", f"{name}: reading Arrow")
    if content[: len(_FEATHER_1_MAGIC)] == _FEATHER_1_MAGIC:
        raise ConfigError(
            f"{name}: Feather version 1, which is not Arrow", hint="Write it again as Feather version 2."
        )
    if content[: len(_FILE_MAGIC)] == _FILE_MAGIC:
        return ipc.open_file(content)
    mark = _CONTINUES + _ENDS if content[: len(_CONTINUES)] == _CONTINUES else _ENDS
    if content[-len(mark) :] != mark:
        # The format lets a stream end without the mark, but then rows may be missing and nothing tells.
        raise ConfigError(
            f"{name}: not Arrow, or an Arrow stream without its end: rows may be missing",
            hint="Copy or make the file again: its writer must be closed.",
        )
    return ipc.open_stream(content)


def _ipc_batches(path: str, name: str) -> Iterator[pyarrow.RecordBatch]:
    content = _mapped(path)
    reader = _ipc_reader(content, name)
    if hasattr(reader, "num_record_batches"):
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = iter(reader)
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)
            # What was read so far stays in the page cache, but is no part of this process any more.
            content.madvise(mmap.MADV_DONTNEED)


_UNFIT = (ValueError, OverflowError)
"""Nanoseconds, years beyond 9999, text that is no UTF-8."""


def _values(batch: pyarrow.RecordBatch, name: str, number: int) -> list[dict[str, Any]]:
    """The rows of `batch`, of which the first has this number."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except _UNFIT:
        for column in batch.schema.names:
            for index, value in enumerate(batch.column(column)):
                _check_value(value, f"{name} row {number + index}: column '{column}'")
        raise


def _check_value(value: pyarrow.Scalar, what: str) -> None:
    try:
        value.as_py()
    except _UNFIT as error:
        raise ConfigError(
            f"{what} has a {value.type} that Python can't hold: {error}",
            hint="Convert the column (timestamps to microseconds), or leave it out.",
        ) from None


@contextmanager
def _complaints(name: str, format: Format) -> Iterator[None]:
    """What pyarrow raises becomes ConfigError."""
    kind = "Parquet" if format == "parquet" else "Arrow"
    exceptions = need("pyarrow", f"{name}: reading {kind}").ArrowException
    try:
        yield
    except (OSError, exceptions) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(name, error) from error
        raise ConfigError(
            f"{name}: not {kind}, or cut off or damaged: {error}",
            hint="Copy or make the file again; is it what its suffix says?",
        ) from error
