"""Parquet and Arrow: types are kept, and what is cut off, damaged or can't be held is told."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpcserve.batch.inputs import extras
from hpcserve.batch.inputs.files import open_inputs
from hpcserve.errors import ConfigError

from .conftest import Write, arrow_file, arrow_stream, checked, columns, refusal

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("id", pa.int32()),
        ("text", pa.large_string()),
        ("at", pa.timestamp("us")),
        ("messages", MESSAGES),
        ("label", pa.dictionary(pa.int8(), pa.string())),
    ]
)
ROWS: list[dict[str, Any]] = [
    {
        "id": number,
        "text": None if number == 3 else f"text {number}",
        "at": dt.datetime(2026, 1, 1, 0, 0, number % 60),
        "messages": [{"role": "user", "content": f"hello {number}"}],
        "label": "even" if number % 2 == 0 else "odd",
    }
    for number in range(3000)
]
BATCHES = [pa.RecordBatch.from_pylist(ROWS[start : start + 1500], SCHEMA) for start in (0, 1500)]
TABLE = pa.Table.from_batches(BATCHES)


def save(name: str) -> None:
    if name.endswith(".parquet"):
        pq.write_table(TABLE, name, row_group_size=700)
    elif name == "stream.arrow":
        arrow_stream(Path(name), BATCHES)
    else:
        arrow_file(Path(name), BATCHES)


@pytest.mark.parametrize("name", ["data.parquet", "stream.arrow", "data.feather"])
def test_values_and_types_are_kept(name: str) -> None:
    save(name)
    inputs = open_inputs([name])
    rows = list(inputs.checked_rows())
    assert [row.columns for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(3000))
    assert rows[2999].place == f"{name} row 2999"
    assert inputs.schema == SCHEMA
    assert inputs.columns == tuple(SCHEMA.names)
    assert inputs.kind == "rows"
    assert [file.rows for file in inputs.files] == [3000]


def test_the_rows_of_parquet_are_known_before_they_are_read() -> None:
    save("data.parquet")
    save("data.feather")
    assert [file.rows for file in open_inputs(["data.parquet", "data.feather"]).files] == [3000, None]


@pytest.mark.parametrize(("name", "kind"), [("data.parquet", "Parquet"), ("data.feather", "Arrow")])
def test_a_file_cut_off_is_told(name: str, kind: str) -> None:
    save(name)
    path = Path(name)
    path.write_bytes(path.read_bytes()[:-30])
    message, hint = refusal(name)
    assert message.startswith(f"{name}: not {kind}, or cut off or damaged: ")
    assert hint == "Copy or make the file again; is it what its suffix says?"


@pytest.mark.parametrize("missing", [8, 100])
def test_a_stream_without_its_end_is_told_even_between_two_batches(missing: int) -> None:
    save("stream.arrow")
    path = Path("stream.arrow")
    path.write_bytes(path.read_bytes()[:-missing])
    assert refusal("stream.arrow") == (
        "stream.arrow: not Arrow, or an Arrow stream without its end: rows may be missing",
        "Copy or make the file again: its writer must be closed.",
    )


def test_damage_inside_is_told() -> None:
    pq.write_table(TABLE, "data.parquet", compression="zstd", use_dictionary=False, row_group_size=10_000)
    content = bytearray(Path("data.parquet").read_bytes())
    start = pq.ParquetFile("data.parquet").metadata.row_group(0).column(1).data_page_offset
    content[start + 40 : start + 80] = bytes(40)
    Path("data.parquet").write_bytes(content)
    assert refusal("data.parquet")[0].startswith("data.parquet: not Parquet, or cut off or damaged: ")


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_text_with_such_a_suffix_is_told(write: Write, name: str) -> None:
    write(name, '{"a": "this is a line of JSON"}\n')
    assert refusal(name)[0].startswith(f"{name}: not ")


def test_feather_of_version_1_is_told(write: Write) -> None:
    write("data.feather", b"FEA1" + bytes(100))
    assert refusal("data.feather") == (
        "data.feather: Feather version 1, which is not Arrow",
        "Write it again as Feather version 2.",
    )


@pytest.mark.parametrize("name", ["data.parquet", "stream.arrow", "data.arrow"])
def test_a_file_without_rows_is_told(name: str) -> None:
    empty = pa.schema([("a", pa.int64())]).empty_table()
    if name == "data.parquet":
        pq.write_table(empty, name)
    else:
        (arrow_stream if name == "stream.arrow" else arrow_file)(
            Path(name), [pa.RecordBatch.from_pylist([], empty.schema)]
        )
    assert refusal(name) == (f"{name}: the file has no rows", "Leave it out, or make it again.")


def test_a_value_that_python_can_not_hold_is_told_with_its_row() -> None:
    stamps = pa.array([10**9] * 2000 + [10**12], pa.timestamp("s"))  # of 2001, and of 33658
    pq.write_table(pa.table({"ok": list(range(2001)), "at": stamps}), "data.parquet")
    message, hint = refusal("data.parquet")
    assert message.startswith(
        "data.parquet row 2000: column 'at' has a timestamp[ms] that Python can't hold: "
    )
    assert hint == "Convert the column (timestamps to microseconds), or leave it out."


def test_a_column_that_is_there_twice_is_told() -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), "data.parquet")
    assert refusal("data.parquet") == ("data.parquet: the column 'a' is there twice", "Rename one of them.")


# Several files


def test_files_of_parquet_and_arrow_go_together(work_dir: Path) -> None:
    save("data.parquet")
    save("stream.arrow")
    rows = checked("data.parquet", "stream.arrow")
    assert [row.number for row in rows] == list(range(6000))
    assert [row.columns for row in rows] == ROWS + ROWS


def table(name: str, **values: pa.Array) -> None:
    pq.write_table(pa.table(values), name)


def test_types_that_differ_between_files_are_told() -> None:
    table("a.parquet", n=pa.array([1], pa.int64()), t=pa.array(["x"]))
    table("b.parquet", t=pa.array(["x"]), n=pa.array(["1"]))
    assert refusal("a.parquet", "b.parquet") == (
        "b.parquet: the column 'n' is string, but in a.parquet it is int64",
        "Convert one of them, or run them apart.",
    )


def test_columns_that_differ_between_files_are_told() -> None:
    table("a.parquet", question=pa.array(["x"]))
    table("b.parquet", questions=pa.array(["x"]))
    assert refusal("a.parquet", "b.parquet") == (
        "b.parquet: the column 'questions' is not in a.parquet",
        "Did you mean 'question'?",
    )


def test_a_column_of_nulls_has_the_type_it_has_elsewhere() -> None:
    """pandas writes a column in which nothing is set without a type."""
    table("a.parquet", n=pa.nulls(1), t=pa.array(["x"]))
    table("b.parquet", n=pa.array([1]), t=pa.array(["y"], pa.large_string()))
    table("c.parquet", n=pa.nulls(1), t=pa.array(["z"]))
    inputs = open_inputs(["?.parquet"])
    assert inputs.schema == pa.schema([("n", pa.int64()), ("t", pa.large_string())])
    assert [row["n"] for row in columns(inputs)] == [None, 1, None]


def test_without_pyarrow_the_hint_is_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    save("data.parquet")

    def no_package(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", no_package)
    with pytest.raises(ConfigError) as error:
        open_inputs(["data.parquet"])
    assert error.value.message == (
        "data.parquet: reading Parquet needs the package pyarrow, which can't be imported: "
        "No module named 'pyarrow'"
    )
    assert error.value.hint == "Install it with `pip install 'hpcserve[batch]'`."


# Memory


def test_a_row_group_as_large_as_the_file_is_read_in_pieces() -> None:
    text = "x" * 1000
    schema = pa.schema([("n", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter("data.parquet", schema, use_dictionary=False, compression="none") as writer:
        writer.write_table(
            pa.table({"n": range(100_000), "text": [f"{n} {text}" for n in range(100_000)]}), 100_000
        )
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for row in open_inputs(["data.parquet"]).rows():
        if row.number % 500 == 0:
            most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < 50 << 20  # of 100 MB
