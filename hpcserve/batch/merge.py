"""From journals to the output: one row for each item, in a file that appears when it is whole.

Anybody may merge, more than once and at the same time: the same journals give the same bytes, and a name is
given to a finished file alone. `output` comes last, so that it says that all is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import disk
from .inputs.files import Inputs
from .journal import Entry, Kind, Lines, set_aside
from .layout import BatchDir
from .manifest import Manifest
from .members import started
from .outputs.answers import Answer, Writer
from .outputs.writers import open_writer, output_name
from .planning import chosen_rows
from .spool import Spool
from .tally import Standing


class Unfinished(Exception):
    """Items have no result, or one whose line is damaged."""

    def __init__(self, items: int) -> None:
        super().__init__(f"{items} results are missing")
        self.items = items


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished output."""

    output: Path
    errors: Path | None
    """OpenAI's format has a file of its own for them."""
    items: int
    failed: int
    results: int
    """In all journals: those beyond `items` were computed more than once."""


def merge(directory: BatchDir, manifest: Manifest, inputs: Inputs) -> Merged:
    """Raises Unfinished, StorageError, and ConfigError when the input can't be read any more."""
    standing = Standing(directory.journals, manifest.items)
    if standing.missing:
        raise Unfinished(standing.missing)
    name = output_name(manifest.output)
    output = directory.out / name
    errors = directory.out / "errors.jsonl" if manifest.output == "openai" else None
    _sweep(directory.out)
    temporary = _temporary(output), None if errors is None else _temporary(errors)
    try:
        damaged = _write(directory, manifest, inputs, standing, temporary)
        if damaged:
            for epoch, offsets in damaged.items():
                set_aside(directory.journals, epoch, offsets)
            raise Unfinished(sum(map(len, damaged.values())))
        if errors is not None and temporary[1] is not None:
            disk.publish(temporary[1], errors)
        disk.publish(temporary[0], output)
    finally:
        for path in temporary:
            if path is not None:
                path.unlink(missing_ok=True)
    failed = int(np.count_nonzero(standing.is_error))
    return Merged(output, errors, manifest.items, failed, standing.results)


def _write(
    directory: BatchDir,
    manifest: Manifest,
    inputs: Inputs,
    standing: Standing,
    paths: tuple[Path, Path | None],
) -> dict[int, list[int]]:
    """Write all; returns the damaged lines, as offsets by epoch."""
    lines = Lines(directory.journals)
    damaged: dict[int, list[int]] = {}
    samples = manifest.asked.samples
    writer: Writer = open_writer(manifest.output, paths[0], paths[1], inputs=inputs, samples=samples)
    try:
        with writer:
            for item, columns, custom_id in _items(directory, manifest, inputs, standing):
                epoch, offset = int(standing.epoch[item]), int(standing.offset[item])
                entry = lines.read(epoch, offset, int(standing.length[item]))
                if entry is None or entry.item != item:
                    damaged.setdefault(epoch, []).append(offset)
                elif not damaged:
                    writer.write(_answer(entry, samples, columns, custom_id))
    finally:
        lines.close()
    return damaged


def _items(
    directory: BatchDir, manifest: Manifest, inputs: Inputs, standing: Standing
) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
    """Every item in the order of the output, with its row's columns or its custom_id where the format has
    them."""
    samples = manifest.asked.samples
    if manifest.output != "openai" and manifest.kind == "rows":
        for row, found in enumerate(chosen_rows(inputs, manifest.asked)):
            for sample in range(samples):
                yield row * samples + sample, found.columns, None
        return
    order: Iterable[int] = range(manifest.items)
    if manifest.order == "completion":
        order = map(int, np.lexsort((standing.offset, standing.epoch)))
    spool = Spool(directory.plan)
    try:
        for request in spool.read(order):
            yield request.item, None, request.custom_id
    finally:
        spool.close()


def _answer(entry: Entry, samples: int, columns: dict[str, Any] | None, custom_id: str | None) -> Answer:
    row, sample = divmod(entry.item, samples)
    return Answer(
        item=entry.item, row=row, sample=sample, custom_id=custom_id, columns=columns, status=entry.status,
        body=bytes(entry.body), error=None if entry.kind == Kind.ANSWER else entry.error,
        attempts=entry.attempts, request_id=entry.request_id,
    )  # fmt: skip


def _sweep(out: Path) -> None:
    """Remove what merges of this host left that are no more."""
    host = os.uname().nodename
    for path in out.glob(f".*.{host}.*"):
        number = path.name.partition(f".{host}.")[2].partition(".")[0]
        if number.isdigit() and started(int(number)) is None:
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
