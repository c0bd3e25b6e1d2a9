"""Files of all formats, and what is said about bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hpcserve.batch.inputs.files import Inputs, open_inputs
from hpcserve.batch.inputs.rows import Row
from hpcserve.errors import ConfigError

Write = Callable[[str, bytes | str], Path]


@pytest.fixture(autouse=True)
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths in tests are relative, as in most command lines."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(work_dir: Path) -> Write:
    def write(name: str, content: bytes | str) -> Path:
        path = work_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def json_lines(rows: Iterable[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def columns(inputs: Inputs) -> list[dict[str, Any]]:
    return [row.columns for row in inputs.rows()]


def checked(*patterns: str) -> list[Row]:
    """What planning does with an input."""
    return list(open_inputs(patterns).checked_rows())


def refusal(*patterns: str) -> tuple[str, str | None]:
    """Message and hint with which an input is refused, when it is opened or when it is read for planning."""
    with pytest.raises(ConfigError) as error:
        checked(*patterns)
    return error.value.message, error.value.hint


def arrow_stream(path: Path, batches: Sequence[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def arrow_file(path: Path, batches: Sequence[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def saved_dataset(directory: Path, shards: Sequence[Sequence[pa.RecordBatch]]) -> None:
    """What `Dataset.save_to_disk` writes (datasets 4.x, at commit b7cb10b0)."""
    directory.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{len(shards):05d}.arrow" for index in range(len(shards))]
    for name, batches in zip(names, shards, strict=True):
        arrow_stream(directory / name, batches)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (directory / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    info = {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""}
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=2))
