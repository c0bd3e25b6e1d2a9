"""The end of a batch: merged, reported, and its working files removed."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import ConfigError
from . import history
from .inputs.files import Inputs, open_inputs
from .layout import BatchDir
from .manifest import Manifest, read_manifest
from .merge import Merged, merge
from .outputs.writers import output_name
from .report import make_report, write_report
from .tally import Tally


def output_path(directory: BatchDir, manifest: Manifest) -> Path:
    """Where the answers are, once they are complete."""
    return directory.out / output_name(manifest.output)


def is_complete(directory: BatchDir) -> bool:
    """Merged, reported and cleared up. Raises RunError when nothing was planned there, and StorageError."""
    return output_path(directory, read_manifest(directory)).exists() and not directory.journals.exists()


def settle(directory: BatchDir) -> bool:
    """Is it complete? Where somebody was killed in the middle of finish(), that is done first.

    Raises as finish() does.
    """
    if not output_path(directory, read_manifest(directory)).exists():
        return False
    if directory.report_text.exists():
        _clear(directory)
    else:
        finish(directory)
    return True


def answered(directory: BatchDir) -> bool:
    """Every item has a result: all that is left is to merge them. Raises RunError and StorageError."""
    manifest = read_manifest(directory)
    if not directory.journals.exists():
        return False
    tally = Tally(directory.journals, manifest.items)
    tally.look()
    return not tally.left


def finish(directory: BatchDir) -> Merged:
    """Merge the journals and say what it cost. Raises Unfinished when there is more to do, StorageError, and
    ConfigError when the input is not what it was."""
    manifest = read_manifest(directory)
    merged = merge(directory, manifest, inputs_of(manifest))
    parts = history.read(directory)
    write_report(directory, make_report(manifest, merged, parts), parts)
    _clear(directory)
    return merged


def _clear(directory: BatchDir) -> None:
    """Remove what a finished batch has no use for."""
    for path in directory.plan.iterdir():
        # The manifest stays: the same command finds that all is done.
        if path != directory.manifest:
            path.unlink(missing_ok=True)
    shutil.rmtree(directory.claims, ignore_errors=True)
    # Last: while they are there, somebody has to come back.
    shutil.rmtree(directory.journals, ignore_errors=True)


def inputs_of(manifest: Manifest) -> Inputs:
    """The input that was planned. Raises ConfigError when it is not there any more, or was changed."""
    known = [file.as_input() for file in manifest.files]
    inputs = open_inputs([file.path for file in manifest.files], known=known)
    for before, now in zip(manifest.files, inputs.files, strict=True):
        if before.digest != now.digest:
            raise ConfigError(
                f"{now.path} was changed since the batch was planned",
                hint="put the file back as it was; the answers are kept in the directory `.batch` until then",
            )
    return inputs
