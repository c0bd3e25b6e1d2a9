"""Directories that Hugging Face's `Dataset.save_to_disk` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from hpcserve.batch.inputs.files import open_inputs

from .conftest import checked, refusal, saved_dataset


def batch(*numbers: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"n": list(numbers)}, metadata={"huggingface": '{"info": {}}'})


def test_the_shards_are_read_in_the_order_of_state_json() -> None:
    saved_dataset(Path("data"), [[batch(0, 1), batch(2)], [batch(3)]])
    inputs = open_inputs(["data/"])
    rows = list(inputs.checked_rows())
    assert [(row.number, row.columns["n"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert rows[3].place == "data/data-00001-of-00002.arrow row 0"
    assert [(Path(file.path).name, file.format, file.rows) for file in inputs.files] == [
        ("data-00000-of-00002.arrow", "arrow", 3),
        ("data-00001-of-00002.arrow", "arrow", 1),
    ]
    assert inputs.schema == pa.schema([("n", pa.int64())])
    state = Path("data/state.json")
    content = json.loads(state.read_text())
    content["_data_files"].reverse()
    state.write_text(json.dumps(content))
    assert [row.columns["n"] for row in checked("data")] == [3, 0, 1, 2]


def test_of_a_dataset_with_splits_one_must_be_named() -> None:
    saved_dataset(Path("data/train"), [[batch(1)]])
    saved_dataset(Path("data/test"), [[batch(2)]])
    Path("data/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert refusal("data") == (
        "data: a Hugging Face dataset with several splits; name one of them",
        "For example data/train or data/test.",
    )
    assert [row.columns["n"] for row in checked("data/test", "data/train")] == [2, 1]


def test_a_file_that_is_missing_is_told() -> None:
    saved_dataset(Path("data"), [[batch(number)] for number in range(6)])
    for number in range(2, 6):
        Path(f"data/data-0000{number}-of-00006.arrow").unlink()
    assert refusal("data") == (
        "data: 4 of the dataset's 6 files are missing: data-00002-of-00006.arrow, "
        "data-00003-of-00006.arrow, data-00004-of-00006.arrow, …",
        "Copy or save the dataset again.",
    )


@pytest.mark.parametrize(
    ("state", "message", "hint"),
    [
        (
            '{"_data_files": [',
            "data/state.json: broken JSON: Input data was truncated",
            "Copy or save the dataset again.",
        ),
        (
            "{}",
            "data/state.json: no list of the dataset's files in `_data_files`",
            "Save the dataset again with `save_to_disk`.",
        ),
        ('{"_data_files": []}', "data/state.json: the dataset has no files", "Leave it out."),
        (
            '{"_data_files": [{"filename": "d.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}',
            "data/state.json: the dataset's rows are picked by an indices file, which is not read here",
            "Save it again after `dataset = dataset.flatten_indices()`.",
        ),
    ],
)
def test_a_bad_state_is_told(state: str, message: str, hint: str) -> None:
    saved_dataset(Path("data"), [[batch(1)]])
    Path("data/state.json").write_text(state)
    assert refusal("data") == (message, hint)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("part-0.parquet", "Name its files: 'data/*.parquet'."),
        ("part-0.jsonl.gz", "Name its files: 'data/*.jsonl.gz'."),
        ("README.md", "Name files, or a directory made by `Dataset.save_to_disk`."),
    ],
)
def test_any_other_directory_is_told(name: str, hint: str) -> None:
    Path("data").mkdir()
    Path("data", name).touch()
    assert refusal("data") == (
        "data: a directory without state.json, so it is no Hugging Face dataset",
        hint,
    )
