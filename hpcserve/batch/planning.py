"""Planning: the whole input is read once, every request rendered and counted, and the order of work laid
down.

A plan appears whole, under its name, or not at all: it is made in a directory of another name beside. What
can't be read or rendered is found here, before a model is loaded, with its place.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from . import disk
from .inputs.files import Inputs
from .inputs.rows import Row
from .layout import BatchDir
from .lengths import Counter
from .manifest import Asked, Manifest, describe, read_manifest
from .members import started
from .order import LEVELS, prefix_marks, work_order
from .outputs.table import check_columns, result_columns
from .prompts import Prompts, Request, RowError
from .spool import PLACE, SpoolWriter
from .work import make_directory

_GROUP = 256
"""Rows of a shared prefix that go together at most: about what one replica has in flight."""
_UNBOUNDED = 512
"""Tokens expected of an answer where the request does not bound it."""
_BAD_ROWS = 10
_WRITTEN = 1 << 20
"""Items written in one call."""
_AT_ONCE = 1024
"""Prompts counted in one call."""


def make_plan(
    directory: BatchDir,
    inputs: Inputs,
    prompts: Prompts,
    counter: Counter,
    asked: Asked,
    *,
    output: str,
    order: str,
    by_prefix: bool = True,
    on_row: Callable[[int], None] = lambda row: None,
) -> Manifest:
    """Plan a batch that was not planned yet. `on_row` hears the number of each row.

    Raises ConfigError for what is wrong with the input, and StorageError. When another command planned the
    same directory meanwhile, that plan is returned.
    """
    new = [path for path in (directory.work, *directory.work.parents) if not os.path.lexists(path)]
    make_directory(directory.work)
    _sweep(directory)
    where = directory.work / f".plan.{os.uname().nodename}.{os.getpid()}"
    make_directory(where)
    try:
        manifest = _fill(where, inputs, prompts, counter, asked, output, order, by_prefix, on_row)
        try:
            os.rename(where, directory.plan)
        except OSError as error:
            if not directory.manifest.exists():
                raise disk.failed(error, "rename") from error
            return read_manifest(directory)
        disk.sync_directory(directory.work)
        return manifest
    finally:
        shutil.rmtree(where, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # only those that nothing came into
                path.rmdir()


def _fill(
    where: Path,
    inputs: Inputs,
    prompts: Prompts,
    counter: Counter,
    asked: Asked,
    output: str,
    order: str,
    by_prefix: bool,
    on_row: Callable[[int], None],
) -> Manifest:
    spool = SpoolWriter(where)
    marks = bytearray()
    rows = prompt_tokens = 0
    # Of files with a header the columns were checked before.
    taken = frozenset(result_columns(asked.samples) if output != "openai" and inputs.kind == "rows" else ())
    try:
        for row, requests in _rendered(chosen_rows(inputs, asked), prompts, counter):
            on_row(row.number)
            rows += 1
            if not taken.isdisjoint(row.columns):
                check_columns(row.columns, samples=asked.samples)
            for request, tokens in requests:
                spool.add(request, tokens)
                marks += np.array(prefix_marks(request.text), "<u4").tobytes()
                prompt_tokens += tokens
    finally:
        spool.close()
    if not rows:
        raise ConfigError("no row is left of the input", hint="look at --limit and --sample")
    _write_order(where, np.frombuffer(marks, "<u4").reshape(-1, LEVELS), by_prefix=by_prefix)
    del marks
    manifest = describe(
        inputs, asked, output, order, rows=rows, items=spool.items, prompt_tokens=prompt_tokens,
        tokens_exact=counter.exact,
    )  # fmt: skip
    disk.write_whole(where / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


def chosen_rows(inputs: Inputs, asked: Asked) -> Iterator[Row]:
    """The rows that the batch is about, in order; the same ones every time. Raises ConfigError."""
    if asked.sample is not None:
        total = sum(1 for _ in inputs.rows())
        if asked.sample > total:
            raise ConfigError(
                f"--sample {asked.sample}: the input has {total} rows", hint="leave it out for all of them"
            )
        chosen = sorted(random.Random(asked.seed or 0).sample(range(total), asked.sample))
        wanted = iter(chosen)
        next_row = next(wanted)
        for row in inputs.checked_rows():
            if row.number == next_row:
                yield row
                next_row = next(wanted, -1)
        return
    yield from islice(inputs.checked_rows(), asked.limit)


def _rendered(
    rows: Iterator[Row], prompts: Prompts, counter: Counter
) -> Iterator[tuple[Row, list[tuple[Request, int]]]]:
    """Raises ConfigError with the first rows that can't be rendered."""
    bad: list[str] = []
    while batch := list(islice(rows, _AT_ONCE)):
        good: list[tuple[Row, list[Request]]] = []
        for row in batch:
            try:
                good.append((row, prompts.requests(row)))
            except RowError as error:
                bad.append(f"{row.place}: {error.message}")
        if len(bad) >= _BAD_ROWS:
            break
        if bad:
            continue
        # All samples of a row have one prompt.
        counts = iter(counter.count_all([r[0].text for _, r in good if r[0].prompt_tokens is None]))
        for row, requests in good:
            exact = requests[0].prompt_tokens
            tokens = next(counts) if exact is None else exact
            yield row, [(request, tokens) for request in requests]
    if bad:
        more = "" if len(bad) < _BAD_ROWS else f"\n(the first {_BAD_ROWS}; there may be more)"
        raise ConfigError(
            "rows that can't be rendered:\n" + "\n".join(f"  {text}" for text in bad[:_BAD_ROWS]) + more,
            hint="mend the rows or the template; nothing was sent",
        )


def _write_order(where: Path, marks: npt.NDArray[np.uint32], *, by_prefix: bool) -> None:
    """order.bin: the items in the order of work, eight bytes each."""
    places = np.memmap(where / "places.bin", PLACE, mode="r")
    prompt, output = places["prompt"].copy(), places["most"].copy()
    del places  # for ten million items a quarter of what this takes
    output[output == 0] = _UNBOUNDED
    order = work_order(prompt, output, marks, group_limit=_GROUP, prefix=by_prefix)
    path = where / "order.bin"
    handle = disk.create(path)
    assert handle is not None, "the directory is this process's own"
    try:
        for start in range(0, len(order), _WRITTEN):
            disk.append(handle, order[start : start + _WRITTEN].astype("<u8").tobytes(), path)
        disk.sync(handle, path)
    finally:
        os.close(handle)


def _sweep(directory: BatchDir) -> None:
    """Remove what planners of this host left that are no more."""
    host = os.uname().nodename
    for entry in directory.work.glob(f".plan.{host}.*"):
        with suppress(ValueError):
            if started(int(entry.name.rpartition(".")[2])) is None:
                shutil.rmtree(entry, ignore_errors=True)
