"""Results from one format into another: all rows, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcserve.batch.outputs.jsonl import JsonlWriter
from hpcserve.batch.outputs.openai import OpenAIWriter
from hpcserve.errors import ConfigError

from .made import answered, embedding, failed, lines

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from hpcserve.batch.outputs.convert import convert, format_of  # noqa: E402


def batch(directory: Path) -> Path:
    with OpenAIWriter(directory / "output.jsonl", directory / "errors.jsonl") as writer:
        for row in range(12):
            answer = failed if row % 3 == 1 else answered
            writer.write(answer(row, custom_id=f"c{row}"))
    return directory


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with JsonlWriter(path) as writer:
        for row, columns in enumerate(rows):
            writer.write(answered(row, columns=columns) if row else failed(row, columns=columns))
    return path


def test_a_directory_of_batch_lines_becomes_a_table_in_order(tmp_path: Path) -> None:
    assert convert(batch(tmp_path), tmp_path / "table.parquet") == 12
    found = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["custom_id"] for row in found] == [f"c{row}" for row in range(12)]
    assert found[0]["response"] == "hello"
    assert (found[1]["response"], found[1]["error"]) == (None, "engine_died: three times")
    assert found[0]["attempts"] is None, "batch lines do not say"
    assert convert(tmp_path, tmp_path / "table.jsonl") == 12
    assert lines(tmp_path / "table.jsonl") == found


def test_one_file_of_batch_lines_becomes_a_table_of_its_rows(tmp_path: Path) -> None:
    assert convert(batch(tmp_path) / "errors.jsonl", tmp_path / "errors.parquet") == 4


def test_lines_and_parquet_become_each_other(tmp_path: Path) -> None:
    source = table(
        tmp_path / "a.jsonl", [{"id": 1, "mixed": "x"}, {"id": 2, "mixed": 5}, {"id": 3, "mixed": [1]}]
    )
    warnings: list[str] = []
    convert(source, tmp_path / "b.parquet", warn=warnings.append)
    assert len(warnings) == 1
    convert(tmp_path / "b.parquet", tmp_path / "c.jsonl")
    assert lines(tmp_path / "c.jsonl") == lines(source), "JSON text is read back as what it was"


def test_embeddings_stay_vectors(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        writer.write(answered(0, embedding([0.5, 0.1]), columns={"id": 1}))
    convert(tmp_path / "a.jsonl", tmp_path / "b.parquet")
    assert pq.read_schema(tmp_path / "b.parquet").field("response").type == pa.list_(pa.float32())
    convert(tmp_path / "b.parquet", tmp_path / "c.jsonl")
    assert lines(tmp_path / "c.jsonl") == lines(tmp_path / "a.jsonl")


def test_formats_are_told_by_what_is_in_the_file(tmp_path: Path) -> None:
    assert format_of(batch(tmp_path) / "output.jsonl") == "openai"
    assert format_of(table(tmp_path / "a.jsonl", [{"id": 1}])) == "jsonl"
    other = tmp_path / "other.jsonl"
    for content in ('{"id": 1}\n', "no json\n", "[1]\n", ""):
        other.write_text(content)
        with pytest.raises(ConfigError, match="its first line is neither"):
            format_of(other)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.jsonl", "b.parquet", "does not exist"),
        ("a.jsonl", "b.csv", "can be converted to .jsonl and .parquet"),
        ("a.jsonl", "a.jsonl", "is there already"),
        ("a.csv", "b.parquet", "results are .jsonl or .parquet"),
        ("empty", "b.parquet", "holds neither output.jsonl nor errors.jsonl"),
        ("torn.parquet", "b.jsonl", "torn.parquet: "),
    ],
)
def test_what_can_not_be_converted_is_refused(tmp_path: Path, source: str, target: str, message: str) -> None:
    table(tmp_path / "a.jsonl", [{"id": 1}])
    (tmp_path / "a.csv").write_text("id\n1\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1...")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message) as raised:
        convert(tmp_path / source, tmp_path / target)
    assert raised.value.hint
    assert not list(tmp_path.glob(".*.part")), "nothing is left"


def test_a_table_does_not_become_batch_lines(tmp_path: Path) -> None:
    table(tmp_path / "a.jsonl", [{"id": 1}])
    with pytest.raises(ConfigError, match="a table has no whole answers"):
        convert(tmp_path / "a.jsonl", tmp_path / "output")


def test_a_broken_line_is_named_and_no_target_is_left(tmp_path: Path) -> None:
    source = table(tmp_path / "a.jsonl", [{"id": 1}, {"id": 2}])
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: "):
        convert(source, tmp_path / "b.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_line_of_another_tool_counts_by_its_place(tmp_path: Path) -> None:
    line = {"id": "batch_req_abc", "custom_id": "x", "response": None, "error": {"code": "c", "message": "m"}}
    (tmp_path / "errors.jsonl").write_text(json.dumps(line) + "\n")
    convert(tmp_path / "errors.jsonl", tmp_path / "t.jsonl")
    assert lines(tmp_path / "t.jsonl")[0]["error"] == "c: m"
