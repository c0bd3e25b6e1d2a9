"""Results in another format: OpenAI's batch lines into a table, and tables into each other.

A table has no whole answers (their ids, log probabilities, choices), so it can't become batch lines.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import ConfigError
from ...rundir.atomic import storage_error
from .answers import Answer
from .column_types import is_json_text
from .jsonl import JsonlWriter
from .openai import ID_PREFIX, Line
from .parquet import ParquetWriter
from .shown import vector
from .table import RESULTS, table_row

Format = Literal["openai", "jsonl", "parquet"]
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
"""Names of the two files of OpenAI's format in a directory of results."""

_decode_line = msgspec.json.Decoder(Line).decode
_decode_row = msgspec.json.Decoder(dict[str, Any]).decode
_Row = dict[str, Any]


def convert(source: Path, target: Path, *, warn: Callable[[str], None] = lambda text: None) -> int:
    """Write `target`, whose suffix says its format (.jsonl or .parquet: a table), and count its rows.

    `source` is a table, a file of batch lines, or a directory with both files of them. `target` is there only
    once it is whole. Raises ConfigError and StorageError.
    """
    if target.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(
            f"{target}: results can be converted to .jsonl and .parquet; a table has no whole answers, so it"
            " can't become OpenAI's batch lines",
            hint="Give the file such a suffix.",
        )
    if target.exists():
        raise ConfigError(f"{target} is there already", hint="Remove it, or choose another name.")
    rows = _rows(source)
    part = target.with_name(f".{target.name}.part")
    count = 0
    try:
        parquet = target.suffix == ".parquet"
        with ParquetWriter(part, warn=warn) if parquet else JsonlWriter(part) as writer:
            for row in rows:
                writer.write_row(row)
                count += 1
        _rename(part, target)
    finally:
        part.unlink(missing_ok=True)
    return count


def format_of(path: Path) -> Format:
    """What a file of results is, by its suffix and its first line. Raises ConfigError."""
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix != ".jsonl":
        raise ConfigError(
            f"{path}: results are .jsonl or .parquet", hint="Give a file that `hpcserve batch` wrote."
        )
    for _, line in _lines(path):
        try:
            members = set(_decode_row(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            break
        if members == set(Line.__struct_fields__):
            return "openai"
        if members.issuperset(RESULTS):
            return "jsonl"
        break
    raise ConfigError(
        f"{path}: its first line is neither one of OpenAI's batch output nor a row of results",
        hint="Give a file that `hpcserve batch` wrote.",
    )


def _rows(source: Path) -> Iterator[_Row]:
    if source.is_dir():
        files = [source / name for name in (OUTPUT, ERRORS) if (source / name).is_file()]
        if not files:
            raise ConfigError(
                f"{source} holds neither {OUTPUT} nor {ERRORS}", hint="Give that directory, or one file."
            )
        return _batch_rows(files)
    if not source.is_file():
        raise ConfigError(f"{source} does not exist", hint="Give a file or a directory of results.")
    form = format_of(source)
    if form == "openai":
        return _batch_rows([source])
    return _parquet_rows(source) if form == "parquet" else _jsonl_rows(source)


def _batch_rows(files: list[Path]) -> Iterator[_Row]:
    """In the order of items, where each of the files is."""
    for _, answer in heapq.merge(*map(_answers, files), key=lambda each: each[0]):
        yield table_row(answer, samples=1) | {"attempts": None}  # lines do not say


def _answers(path: Path) -> Iterator[tuple[int, Answer]]:
    for number, text in _lines(path):
        try:
            line = _decode_line(text)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _broken(path, number, error) from error
        item = line.id.removeprefix(ID_PREFIX)
        place = int(item) if item.isdecimal() else number - 1
        response = line.response
        yield (
            place,
            Answer(
                item=place,
                row=place,
                sample=0,
                custom_id=line.custom_id,
                status=response.status_code if response else 0,
                body=bytes(response.body) if response else b"",
                error=(line.error.code, line.error.message) if line.error else None,
                request_id=response.request_id if response else "",
            ),
        )


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in _lines(path):
        try:
            row = _decode_row(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _broken(path, number, error) from error
        yield _with_vector(row)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    try:
        with pq.ParquetFile(path) as file:
            texts = [field.name for field in file.schema_arrow if is_json_text(field)]
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    for name in texts:
                        if row[name] is not None:
                            row[name] = msgspec.json.decode(row[name])
                    yield _with_vector(row)
    except OSError as error:
        raise storage_error(error, "read") from error
    except pa.ArrowException as error:
        raise ConfigError(f"{path}: {error}", hint="Is it whole, and a file of results?") from error


def _with_vector(row: _Row) -> _Row:
    """A list for a response is an embedding."""
    if isinstance(row.get("response"), list):
        found = vector(row["response"])
        row["response"] = row["response"] if found is None else found
    return row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise storage_error(error, "read") from error


def _broken(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(f"{path}:{number}: {error}", hint="Each line is one JSON object; is the file whole?")


def _rename(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise storage_error(error, "write") from error
