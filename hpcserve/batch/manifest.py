"""What a batch is: written once, when planning is through, and compared with what is asked later.

Whatever an answer depends on is in it: the same command goes on with the batch, and another one is refused
with the differences, for answers to two questions must not be mixed in one file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import msgspec

from .. import __version__
from ..errors import ConfigError, RunError, StorageError
from . import disk
from .inputs.files import InputFile, Inputs
from .inputs.formats import Format
from .layout import BatchDir

FORMAT = 1
_OWN_OUTPUT = (
    "the pattern takes in what is in the output directory: give another one with -o, or a narrower pattern"
)
_AROUND = 30
"""Characters that are shown before a difference in long texts; twice as many follow."""


class File(msgspec.Struct, frozen=True):
    """One input file."""

    path: str
    format: Format
    size: int
    mtime_ns: int
    digest: str
    """XXH3-128 of its bytes."""

    def as_input(self) -> InputFile:
        """For open_inputs(), which does not read a file again that it knows."""
        return InputFile(
            path=self.path,
            format=self.format,
            size=self.size,
            mtime_ns=self.mtime_ns,
            digest=self.digest,
            rows=None,
        )


class Asked(msgspec.Struct, frozen=True):
    """Everything that answers depend on, but for the input."""

    model: str
    revision: str | None
    template: str | None
    system: str | None
    prompt_column: str | None
    messages_column: str | None
    sampling: dict[str, Any]
    samples: int
    seed: int | None
    limit: int | None
    """Rows from the start of the input."""
    sample: int | None
    """Rows chosen at random."""


class Manifest(msgspec.Struct, frozen=True):
    """A planned batch."""

    format: int
    version: str
    """Of hpcserve."""
    created: float
    """Unix seconds."""
    kind: str
    """`rows`, or `openai` batch lines."""
    files: tuple[File, ...]
    asked: Asked
    output: str
    """`openai`, `jsonl` or `parquet`."""
    order: str
    """Of the output: `input` or `completion`."""
    rows: int
    items: int
    """Rows times samples."""
    prompt_tokens: int
    tokens_exact: bool
    """They were counted with the model's tokenizer."""


class _Told(msgspec.Struct):
    """What a manifest of any format has."""

    format: int
    version: str = "of another version"


def describe(
    inputs: Inputs,
    asked: Asked,
    output: str,
    order: str,
    *,
    rows: int = 0,
    items: int = 0,
    prompt_tokens: int = 0,
    tokens_exact: bool = False,
) -> Manifest:
    """The manifest of a batch; before it is planned, without the counts."""
    return Manifest(
        format=FORMAT,
        version=__version__,
        created=round(time.time(), 3),
        kind=inputs.kind,
        files=tuple(
            File(path=f.path, format=f.format, size=f.size, mtime_ns=f.mtime_ns, digest=f.digest)
            for f in inputs.files
        ),
        asked=asked,
        output=output,
        order=order,
        rows=rows,
        items=items,
        prompt_tokens=prompt_tokens,
        tokens_exact=tokens_exact,
    )


def read_manifest(directory: BatchDir) -> Manifest:
    """Raises RunError when nothing was planned there, and StorageError."""
    path = directory.manifest
    try:
        text = path.read_bytes()
        # Another format may have other members: what it is comes first.
        told = msgspec.json.decode(text, type=_Told)
        if told.format != FORMAT:
            raise StorageError(
                f"{path} has format {told.format}, this hpcserve ({__version__}) reads {FORMAT}",
                hint=f"finish it with hpcserve {told.version}, or give another output directory with -o",
            )
        return msgspec.json.decode(text, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"no batch was planned in {directory.out}",
            hint="`hpcserve batch MODEL.yaml DATA -o DIR` plans one",
        ) from None
    except OSError as error:
        raise disk.failed(error, "read") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} is damaged: {error}",
            hint=f"remove {directory.work} to plan anew; the answers in it are lost then",
        ) from error


def check_same(before: Manifest, now: Manifest, directory: BatchDir) -> None:
    """Raises ConfigError with every difference that would mix answers to two questions."""
    found = list(differences(before, now))
    if found:
        new = {file.path for file in now.files} - {file.path for file in before.files}
        own = any(os.path.dirname(path) == str(directory.out) for path in new)
        raise ConfigError(
            f"{directory.out} has a batch of another request or input:\n"
            + "\n".join(f"  {one}" for one in found),
            hint=_OWN_OUTPUT
            if own
            else "give the command that began it to go on with it, or another output directory with -o",
        )


def differences(before: Manifest, now: Manifest) -> Iterator[str]:
    """In words, one a line."""
    old, new = _essence(before), _essence(now)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f"{name}: {_change(old.get(name), new.get(name))}"
    # A file may move; what is in it may not change.
    for number, (was, is_) in enumerate(zip_longest(before.files, now.files), 1):
        if was is None or is_ is None:
            yield f"input {number}: {'none' if was is None else was.path} → {is_.path if is_ else 'none'}"
        elif was.digest != is_.digest:
            moved = f" → {is_.path}" if was.path != is_.path else ""
            yield f"input {number}: {was.path}{moved}: its content is another one"


def _essence(manifest: Manifest) -> dict[str, Any]:
    asked = msgspec.structs.asdict(manifest.asked)
    sampling: Mapping[str, Any] = asked.pop("sampling")
    found = {**asked, **{f"sampling {name}": value for name, value in sampling.items()}}
    found |= {"output": manifest.output, "order": manifest.order, "kind": manifest.kind}
    return found


def _change(old: Any, new: Any) -> str:
    """Both values in short, long ones from a little before their first difference on."""
    one, other = _shown(old), _shown(new)
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = same - _AROUND if same > 2 * _AROUND else 0
    return f"{_cut(one, start)} → {_cut(other, start)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and value.isprintable():
        return value
    return msgspec.json.encode(value).decode()


def _cut(text: str, start: int) -> str:
    end = start + 3 * _AROUND
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
