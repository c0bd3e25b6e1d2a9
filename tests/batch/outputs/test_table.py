"""Tables in lines of JSON, and names that are taken."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import pytest

from hpcserve.batch.outputs.jsonl import JsonlWriter
from hpcserve.batch.outputs.table import check_columns
from hpcserve.errors import ConfigError

from .made import answered, embedding, failed, lines


def test_each_row_has_the_inputs_columns_and_the_results(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "part") as writer:
        writer.write(answered(0, columns={"id": 7, "question": "?"}, attempts=2))
        writer.write(failed(1, columns={"id": 8, "question": "¿"}))
    first, second = lines(tmp_path / "part")
    assert first == {
        "id": 7, "question": "?", "response": "hello", "reasoning": None, "finish_reason": "stop",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 4}, "attempts": 2,
        "error": None,
    }  # fmt: skip
    assert list(first)[:2] == ["id", "question"]
    assert second["question"] == "¿"
    assert (second["response"], second["error"]) == (None, "engine_died: three times")
    assert list(second) == list(first), "a failed row has the same columns"


def test_samples_are_numbered_only_where_there_are_several(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "part", samples=2) as writer:
        writer.write(answered(0, item=0, sample=0, columns={"id": 1}))
        writer.write(answered(0, item=1, sample=1, columns={"id": 1}))
    assert [(row["id"], row["sample"]) for row in lines(tmp_path / "part")] == [(1, 0), (1, 1)]


def test_custom_ids_stand_for_the_columns_of_batch_lines(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "part") as writer:
        writer.write(answered(0, embedding([0.5, 0.25]), custom_id="a"))
    [row] = lines(tmp_path / "part")
    assert next(iter(row)) == "custom_id"
    assert row["response"] == [0.5, 0.25]


def test_values_that_json_has_not_are_no_reason_to_stop(tmp_path: Path) -> None:
    columns = {
        "half": "\ud800", "nested": [{"\udfff": "x\ud83d\ude00"}], "nan": float("nan"), "large": 10**30,
        "day": datetime.date(2026, 1, 2), "price": Decimal("1.10"), "raw": b"\xff", "odd": range(2),
    }  # fmt: skip
    with JsonlWriter(tmp_path / "part") as writer:
        writer.write(answered(0, columns=columns))
    [row] = lines(tmp_path / "part")
    assert row["half"] == "�"
    assert row["nested"] == [{"�": "x😀"}]
    assert (row["nan"], row["large"], row["day"]) == (None, 10**30, "2026-01-02")
    assert (row["price"], row["raw"], row["odd"]) == ("1.10", "/w==", "range(0, 2)")


def test_a_name_that_is_taken_is_an_error_with_the_names_there_are() -> None:
    check_columns(["id", "sample", "text"])
    with pytest.raises(ConfigError, match=r"'usage' has the name of .*response, reasoning") as raised:
        check_columns(["id", "usage"])
    assert raised.value.hint
    with pytest.raises(ConfigError, match="'sample'"):
        check_columns(["sample"], samples=3)


def test_after_an_error_the_file_is_left_closed(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "part")
    with pytest.raises(RuntimeError), writer:
        writer.write(answered(0, columns={"id": 1}))
        raise RuntimeError
    with pytest.raises(ValueError, match="closed"):
        writer.write(answered(1, columns={"id": 2}))
    assert json.loads((tmp_path / "part").read_text())["id"] == 1
