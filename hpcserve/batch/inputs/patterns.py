"""From the paths and patterns of a command line to files."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...config.load import nearest
from ...errors import ConfigError
from . import hf_dataset
from .formats import Format, format_of
from .lines import unreadable


class Found(NamedTuple):
    path: str
    """Absolute."""
    name: str
    """As written, or as the pattern gave it."""
    format: Format
    status: os.stat_result


def find(patterns: Sequence[str]) -> list[Found]:
    """The files, in the order of `patterns`; what one of them matches is sorted. Raises ConfigError.

    A path that exists is that path, whatever `*`, `?` and `[` it has; `**` stands for directories.
    """
    if not patterns:
        raise ConfigError("no input files", hint="Name files, for example data.jsonl or 'data/*.parquet'.")
    files: dict[str, tuple[str, Found]] = {}
    for pattern in patterns:
        for found in _matches(pattern):
            if found.path in files:
                raise ConfigError(
                    f"{found.name}: named twice, by '{files[found.path][0]}' and by '{pattern}'",
                    hint="Name it once; more answers to a row are more samples.",
                )
            files[found.path] = (pattern, found)
    return [found for _, found in files.values()]


def _matches(pattern: str) -> Iterator[Found]:
    if "://" in pattern:
        raise ConfigError(
            f"{pattern}: files are not fetched from the network",
            hint="Download it first; compute nodes often can't.",
        )
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):
        yield from _files(path)
        return
    if not glob.has_magic(path):
        raise _missing(path)
    names = sorted(glob.glob(path, recursive=True))
    if not names:
        raise ConfigError(f"no file matches '{pattern}'", hint=_near_pattern(path))
    for name in names:
        yield from _files(name)


def _files(name: str) -> Iterator[Found]:
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            for shard in hf_dataset.shards(name):
                yield _regular(shard, "arrow", os.stat(shard))
            return
    except OSError as error:
        raise unreadable(name, error) from error
    yield _regular(name, format_of(name), status)


def _regular(name: str, format: Format, status: os.stat_result) -> Found:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(
            f"{name}: not a regular file", hint="Write it to a file: it is read more than once."
        )
    if status.st_size == 0:
        raise ConfigError(f"{name}: the file is empty", hint="Leave it out, or make it again.")
    return Found(os.path.abspath(name), name, format, status)


def _missing(path: str) -> ConfigError:
    directory, name = os.path.split(path)
    near = nearest(name, _entries(directory))
    hint = f"Did you mean '{os.path.join(directory, near)}'?" if near else "Check the path."
    return ConfigError(f"{path}: there is no such file or directory", hint=hint)


def _near_pattern(path: str) -> str:
    directory = os.path.dirname(path)
    while glob.has_magic(directory):
        directory = os.path.dirname(directory)
    entries = [entry for entry in _entries(directory) if not entry.startswith(".")]
    if not entries:
        return f"'{directory}' is empty, or no directory." if directory else "This directory is empty."
    more = ", …" if len(entries) > 5 else ""
    return f"In '{directory or '.'}' there are: {', '.join(entries[:5])}{more}."


def _entries(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory or "."))
    except OSError:
        return []
