"""Directories written by `Dataset.save_to_disk` of Hugging Face's datasets.

state.json has in `_data_files` a list of {"filename": "data-00000-of-00002.arrow"}, Arrow streams in order;
dataset_info.json has the features. A `DatasetDict` is a directory with dataset_dict.json,
{"splits": ["train", "test"]}, and one such directory per split.

By datasets 4.x, src/datasets/arrow_dataset.py `save_to_disk` and dataset_dict.py, read at commit b7cb10b0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from ...errors import ConfigError
from .formats import COMPRESSED, SUFFIXES
from .lines import unreadable

STATE = "state.json"
DATASET_DICT = "dataset_dict.json"


def shards(directory: str) -> list[str]:
    """The Arrow files of a dataset's directory, in order. Raises ConfigError."""
    try:
        entries = sorted(os.listdir(directory))
    except OSError as error:
        raise unreadable(directory, error) from error
    if DATASET_DICT in entries:
        raise ConfigError(
            f"{directory}: a Hugging Face dataset with several splits; name one of them",
            hint=f"For example {_either(_splits(directory))}.",
        )
    if STATE not in entries:
        raise ConfigError(
            f"{directory}: a directory without {STATE}, so it is no Hugging Face dataset",
            hint=_content(directory, entries),
        )
    path = os.path.join(directory, STATE)
    state = _json(path)
    # Until datasets 2.0 a selection or a shuffle could be saved as indices beside the data.
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(
            f"{path}: the dataset's rows are picked by an indices file, which is not read here",
            hint="Save it again after `dataset = dataset.flatten_indices()`.",
        )
    try:
        names = msgspec.convert([item["filename"] for item in state["_data_files"]], list[str])
    except (KeyError, TypeError, msgspec.ValidationError):
        raise ConfigError(
            f"{path}: no list of the dataset's files in `_data_files`",
            hint="Save the dataset again with `save_to_disk`.",
        ) from None
    if not names:
        raise ConfigError(f"{path}: the dataset has no files", hint="Leave it out.")
    missing = [name for name in names if name not in entries]
    if missing:
        raise ConfigError(
            f"{directory}: {len(missing)} of the dataset's {len(names)} files are missing: {_list(missing)}",
            hint="Copy or save the dataset again.",
        )
    return [os.path.join(directory, name) for name in names]


def _splits(directory: str) -> list[str]:
    splits = _json(os.path.join(directory, DATASET_DICT)).get("splits")
    names = [str(split) for split in splits] if isinstance(splits, list) else []
    return [os.path.join(directory, name) for name in names] or [os.path.join(directory, "SPLIT")]


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=dict[str, Any])
    except OSError as error:
        raise unreadable(path, error) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: broken JSON: {error}", hint="Copy or save the dataset again.") from None


def _content(directory: str, entries: Sequence[str]) -> str:
    for suffix in SUFFIXES:
        for ending in (suffix, *(suffix + packed for packed in COMPRESSED)):
            if suffix != ".json" and any(entry.endswith(ending) for entry in entries):
                return f"Name its files: '{os.path.join(directory, '*' + ending)}'."
    return "Name files, or a directory made by `Dataset.save_to_disk`."


def _either(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
