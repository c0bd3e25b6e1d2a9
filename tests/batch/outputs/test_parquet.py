"""Parquet in bounded row groups, with types that widen and rows that are never lost."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.outputs.answers import Answer
from hpcserve.errors import StorageError

from .made import answered, chat, embedding, failed

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from hpcserve.batch.outputs.column_types import is_json_text  # noqa: E402
from hpcserve.batch.outputs.parquet import ParquetWriter  # noqa: E402


def written(directory: Path, answers: Sequence[Answer], **how: Any) -> tuple[Any, list[str]]:
    """The table that was written, and the warnings."""
    warnings: list[str] = []
    with ParquetWriter(directory / "part", warn=warnings.append, **how) as writer:
        for answer in answers:
            writer.write(answer)
    assert [path.name for path in directory.iterdir()] == ["part"], "nothing else is left"
    return pq.read_table(directory / "part"), warnings


def of_column(values: Sequence[Any]) -> list[Answer]:
    return [answered(row, columns={"x": value}) for row, value in enumerate(values)]


def test_rows_have_the_inputs_columns_and_the_results(tmp_path: Path) -> None:
    answers = [answered(0, columns={"id": 1}, attempts=3), failed(1, columns={"id": 2})]
    table, warnings = written(tmp_path, answers)
    assert warnings == []
    assert table.column_names == [
        "id", "response", "reasoning", "finish_reason", "usage", "attempts", "error",
    ]  # fmt: skip
    assert table.column("id").type == pa.int64()
    assert table.column("response").to_pylist() == ["hello", None]
    assert table.column("error").to_pylist() == [None, "engine_died: three times"]
    assert table.column("usage").to_pylist()[0] == {
        "prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 4,
    }  # fmt: skip
    assert table.column("attempts").to_pylist() == [3, 1]


def test_types_are_those_of_the_inputs_schema(tmp_path: Path) -> None:
    kind = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("small", pa.int8()), ("when", pa.timestamp("ms", tz="UTC")), ("kind", kind)])
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    answers = [answered(0, columns={"small": 3, "when": when, "kind": "a"})]
    table, warnings = written(tmp_path, answers, schema=schema)
    assert [table.schema.field(name).type for name in schema.names] == schema.types
    assert table.column("when").to_pylist() == [when]
    assert warnings == []


def test_an_embedding_is_a_list_of_floats(tmp_path: Path) -> None:
    answers = [answered(0, embedding([0.5, 0.25])), failed(1), answered(2, embedding([1.0]))]
    table, warnings = written(tmp_path, answers)
    assert table.column("response").type == pa.list_(pa.float32())
    assert table.column("response").to_pylist() == [[0.5, 0.25], None, [1.0]]
    assert warnings == []


def test_row_groups_are_bounded_by_rows_and_by_bytes(tmp_path: Path) -> None:
    written(tmp_path, of_column(range(10)), group_rows=4)
    groups = pq.ParquetFile(tmp_path / "part").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [4, 4, 2]
    written(tmp_path, [answered(n, chat("y" * 1000)) for n in range(6)], group_bytes=2500)
    groups = pq.ParquetFile(tmp_path / "part").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [3, 3]


def test_no_rows_make_a_table_without_rows(tmp_path: Path) -> None:
    table, _ = written(tmp_path, [], schema=pa.schema([("id", pa.int64())]))
    assert table.num_rows == 0
    assert table.column_names[:2] == ["id", "response"]


def test_rows_that_all_failed_have_a_text_column_for_responses(tmp_path: Path) -> None:
    table, _ = written(tmp_path, [failed(0), failed(1)])
    assert table.column("response").type == pa.string()
    assert table.num_rows == 2


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 0.5, 4], pa.float64()),
        ([None, None, "a", "b"], pa.string()),
        ([[], [], [1], None], pa.list_(pa.int64())),
        ([{"a": 1}, {"a": 2}, {"b": "x"}, None], pa.struct([("a", pa.int64()), ("b", pa.string())])),
    ],
)
def test_a_later_value_widens_its_column_without_a_word(tmp_path: Path, values: list[Any], kind: Any) -> None:
    table, warnings = written(tmp_path, of_column(values), group_rows=2)
    assert table.column("x").type == kind
    assert warnings == []
    if pa.types.is_struct(kind):
        assert table.column("x").to_pylist()[0] == {"a": 1, "b": None}
    else:
        assert table.column("x").to_pylist() == values


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b", 5, "d"],
        [1, 2, "three", None],
        [1, True],
        [{"a": 1}, {"a": "x"}, {}, []],
        [{}, {}, {"a": 1}],
        [10**30, 1],
        [2**60 + 1, 3, 0.5, 1],
        [[1], [2], "no", 3.5, {"k": None}],
        ["\ud800", 1],
    ],
    ids=str,
)
def test_values_that_no_type_holds_are_json_text_with_one_warning(tmp_path: Path, values: list[Any]) -> None:
    table, warnings = written(tmp_path, of_column(values), group_rows=2)
    assert is_json_text(table.schema.field("x"))
    cells = [None if cell is None else json.loads(cell) for cell in table.column("x").to_pylist()]
    assert cells == ["�" if value == "\ud800" else value for value in values]
    assert len(warnings) == 1 and "'x'" in warnings[0]
    assert table.column("response").to_pylist() == ["hello"] * len(values), "other columns are as they were"


def test_a_value_that_does_not_fit_the_schema_is_kept_as_well(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int8())])
    table, warnings = written(tmp_path, of_column([1, 2, "x", 3]), group_rows=2, schema=schema)
    assert [json.loads(cell) for cell in table.column("x").to_pylist()] == [1, 2, "x", 3]
    assert len(warnings) == 1


def test_a_column_that_comes_late_is_null_before(tmp_path: Path) -> None:
    answers = [
        answered(0, columns={"a": 1}),
        answered(1, columns={"b": "x"}),
        answered(2, columns={"c": 1.5}),
    ]
    table, warnings = written(tmp_path, answers, group_rows=1)
    assert table.column_names[:4] == ["a", "b", "c", "response"]
    assert table.column("a").to_pylist() == [1, None, None]
    assert table.column("b").to_pylist() == [None, "x", None]
    assert table.column("c").to_pylist() == [None, None, 1.5]
    assert warnings == []


def test_chats_and_embeddings_in_one_table_are_json_text(tmp_path: Path) -> None:
    answers = [answered(0), answered(1, embedding([0.5])), answered(2)]
    table, warnings = written(tmp_path, answers, group_rows=1)
    assert [json.loads(cell) for cell in table.column("response").to_pylist()] == ["hello", [0.5], "hello"]
    assert len(warnings) == 1


def test_half_a_surrogate_pair_in_a_text_or_name_is_replaced(tmp_path: Path) -> None:
    answers = [*of_column(["ok", "\ud800!"]), answered(2, columns={"\ud800": 1})]
    table, warnings = written(tmp_path, answers)
    assert table.column("x").to_pylist() == ["ok", "�!", None]
    assert table.column("�").to_pylist() == [None, None, 1]
    assert warnings == []


values_strategy = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def without_nulls(value: Any) -> Any:
    """Objects without members that are null: those an Arrow struct can't tell from absent ones."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@settings(max_examples=200)
@given(values=st.lists(values_strategy, min_size=1, max_size=8), group=st.integers(1, 4))
def test_whatever_values_come_every_one_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], group: int
) -> None:
    table, _ = written(tmp_path_factory.mktemp("any"), of_column(values), group_rows=group)
    cells = table.column("x").to_pylist()
    if is_json_text(table.schema.field("x")):
        cells = [None if cell is None else json.loads(cell) for cell in cells]
    assert [without_nulls(cell) for cell in cells] == [without_nulls(value) for value in values]


def test_a_full_disk_is_an_error_with_a_remedy() -> None:
    with pytest.raises(StorageError, match="No space left") as raised:
        write_to_full()
    assert raised.value.hint


def write_to_full() -> None:
    with ParquetWriter(Path("/dev/full"), group_rows=1) as writer:
        for row in range(3):
            writer.write(answered(row, columns={"x": row}))
