"""From a command line to a planned batch: a new one, or the one that was begun by the same command."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ConfigError, RunError
from . import history
from .finish import answered, settle
from .inputs.files import Inputs, open_inputs
from .layout import BatchDir
from .lengths import Counter
from .manifest import Asked, Manifest, check_same, describe, read_manifest
from .outputs.writers import check_output
from .planning import chosen_rows, make_plan
from .prompts import Prompts, PromptSpec, RowError
from .tally import forget_errors

Output = Literal["openai", "jsonl", "parquet"]
Order = Literal["input", "completion"]
OUTPUTS: tuple[Output, ...] = ("openai", "jsonl", "parquet")
_TABLES = ("parquet", "arrow", "hf")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What is asked of a dataset. The texts are Jinja2."""

    inputs: Sequence[str]
    """Files, directories of Hugging Face datasets, and patterns."""
    output: Path
    template: str | None = None
    system: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    seed: int | None = None
    limit: int | None = None
    sample: int | None = None
    format: Output | None = None
    """None: OpenAI's for its own lines, Parquet for tables, else JSON lines."""
    order: Order = "input"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What answers."""

    served_name: str
    """What requests call it."""
    path: str
    """Hub id, or directory."""
    revision: str | None


class Begun(NamedTuple):
    """A planned batch."""

    directory: BatchDir
    manifest: Manifest
    resumed: bool
    complete: bool
    answered: bool
    """All that is left is to merge the answers."""
    forgiven: int = 0
    """Rows that failed in a job that stopped for it: they are sent again."""


class Preview(NamedTuple):
    """A rendered prompt."""

    place: str
    path: str
    body: bytes
    prompt_tokens: int


def begin(request: BatchRequest, model: Model, on_row: Callable[[int], None] = lambda row: None) -> Begun:
    """Plan, or go on with the plan that is there. Raises ConfigError, also with the differences to a batch of
    another command, and StorageError."""
    directory = BatchDir(request.output.absolute())
    before = _before(directory)
    inputs, prompts, counter, asked = _read(request, model, before)
    output = request.format or _natural(inputs)
    if before is not None:
        check_same(before, describe(inputs, asked, output, request.order), directory)
        if settle(directory):
            return Begun(directory, before, True, True, True)
        forgiven, parts = 0, history.read(directory)
        if directory.journals.exists() and history.gave_up(directory, parts):
            forgiven = forget_errors(directory.journals, before.items)
        directory.stop.unlink(missing_ok=True)
        history.ask_again(directory, parts)
        return Begun(directory, before, True, False, answered(directory), forgiven)
    _check_new(directory, inputs, output, request)
    manifest = make_plan(
        directory, inputs, prompts, counter, asked, output=output, order=request.order, on_row=on_row
    )
    # Somebody else may have been quicker, and asked for something else.
    check_same(manifest, describe(inputs, asked, output, request.order), directory)
    return Begun(directory, manifest, False, False, False)


def is_planned(request: BatchRequest) -> bool:
    """Somebody planned a batch in this output directory. Raises ConfigError and StorageError."""
    return _before(BatchDir(request.output.absolute())) is not None


def preview(request: BatchRequest, model: Model, rows: int) -> list[Preview]:
    """The first rendered prompts, as they would be sent. Raises ConfigError and StorageError as begin() does,
    and writes nothing."""
    directory = BatchDir(request.output.absolute())
    before = _before(directory)
    inputs, prompts, counter, asked = _read(request, model, before)
    output = request.format or _natural(inputs)
    if before is None:
        _check_new(directory, inputs, output, request)
    else:
        check_same(before, describe(inputs, asked, output, request.order), directory)
    found = []
    for row in islice(chosen_rows(inputs, asked), rows):
        try:
            made = prompts.requests(row)[0]
        except RowError as error:
            raise ConfigError(f"{row.place}: {error.message}", hint="mend the row or the template") from error
        tokens = made.prompt_tokens
        if tokens is None:
            [tokens] = counter.count_all([made.text])
        found.append(Preview(row.place, made.path, made.body, tokens))
    return found


def _before(directory: BatchDir) -> Manifest | None:
    """The plan that is there. Raises ConfigError and StorageError."""
    out = directory.out
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ConfigError(f"-o {out}: not a directory", hint="give another one; it is made if need be")
    try:
        return read_manifest(directory)
    except RunError:
        return None


def _read(
    request: BatchRequest, model: Model, before: Manifest | None
) -> tuple[Inputs, Prompts, Counter, Asked]:
    if request.limit is not None and request.sample is not None:
        raise ConfigError(
            "--limit and --sample both say which rows", hint="give one of them; --sample chooses from all"
        )
    known = () if before is None else [file.as_input() for file in before.files]
    inputs = open_inputs(request.inputs, known=known)
    spec = PromptSpec(
        model=model.served_name,
        template=request.template,
        system=request.system,
        prompt_column=request.prompt_column,
        messages_column=request.messages_column,
        sampling=request.sampling,
        n=request.samples,
        seed=request.seed,
    )
    asked = Asked(
        model=model.path,
        revision=model.revision,
        template=request.template,
        system=request.system,
        prompt_column=request.prompt_column,
        messages_column=request.messages_column,
        sampling=dict(request.sampling),
        samples=request.samples,
        seed=request.seed,
        limit=request.limit,
        sample=request.sample,
    )
    return inputs, Prompts(spec, inputs.kind), Counter.for_model(model.path), asked


def _natural(inputs: Inputs) -> Output:
    if inputs.kind == "openai":
        return "openai"
    return "parquet" if inputs.schema is not None else "jsonl"


def _check_new(directory: BatchDir, inputs: Inputs, output: Output, request: BatchRequest) -> None:
    """Raises ConfigError."""
    check_output(output, inputs, samples=request.samples)
    if request.order == "completion" and output != "openai":
        raise ConfigError(
            f"--order completion is for --format openai: {output} repeats the input's columns, in its order",
            hint="leave it out, or add --format openai",
        )
    for name in ("output.jsonl", "output.parquet", "errors.jsonl"):
        if (directory.out / name).exists():
            raise ConfigError(
                f"{directory.out / name} is there already, and is not of a batch that can go on",
                hint="give another directory with -o, or move that file away",
            )
