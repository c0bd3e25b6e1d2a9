"""The model on the shared file system: which of its files are staged, and its identity."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ...errors import StorageError
from ...rundir.atomic import storage_error

OTHER_FORMATS = (
    "*.pth",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "pytorch_model*.bin",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
"""Weights that no engine reads where there are safetensors; vLLM's order (`hf`) is *.safetensors, then *.bin.

`consolidated*.safetensors` stay: where there are any, vLLM 0.32 reads them instead of the others.
"""
ORIGINAL = "original"
"""A directory that vLLM leaves out by default (`ignore_patterns`)."""
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a file that looks old is looked at again; an NFS client asks anew when it is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    name: str
    """Below the model's directory, with slashes."""
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is staged: made by rank 0, told to all."""

    path: str
    """`model` as it is in model.yaml."""
    fingerprint: str
    files: tuple[SourceFile, ...]

    @property
    def name(self) -> str:
        """Name of the copy: engines and their caches look at the last part of a model's path."""
        return os.path.basename(os.path.normpath(self.path)) or "model"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def list_model(path: str) -> Listing:
    """Look through the model's directory; links are followed, so a Hub cache's snapshot is taken whole.

    Raises StorageError for one that can't be read or has a link to nothing.
    """
    top = Path(path)
    try:
        found = sorted(_walk(top, "", frozenset()), key=lambda file: file.name)
        config = hashlib.sha256((top / "config.json").read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise StorageError(
            f"can't stage {path}: {error.filename} does not exist, or is a link to nothing",
            hint="is the model complete? In a container, the place that links lead to must be bound, too"
            " (`container.binds` of the site)",
        ) from error
    except OSError as error:
        raise _unreadable(error) from error
    chosen = tuple(file for file in found if not _unused(file.name, found))
    digest = hashlib.sha256("\0".join([path, config]).encode())
    for file in chosen:
        digest.update(f"\0{file.name}\0{file.size}\0{file.mtime_ns}".encode())
    return Listing(path=path, fingerprint=digest.hexdigest()[:20], files=chosen)


def _walk(directory: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[SourceFile]:
    own = directory.stat()
    here = (own.st_dev, own.st_ino)
    if here in above:  # a link back up
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            status = os.stat(entry.path)
            if stat.S_ISDIR(status.st_mode):
                if prefix or entry.name != ORIGINAL:
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
            elif stat.S_ISREG(status.st_mode):
                yield SourceFile(name=prefix + entry.name, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _unused(name: str, files: list[SourceFile]) -> bool:
    safetensors = any("/" not in file.name and file.name.endswith(".safetensors") for file in files)
    return safetensors and any(fnmatch(name.rpartition("/")[2], pattern) for pattern in OTHER_FORMATS)


def open_source(path: str, file: SourceFile, *, pauses: tuple[float, ...] = _PAUSES) -> int:
    """A descriptor for reading. Raises StorageError when it is not the file that rank 0 listed.

    An old view of it (NFS) is given some seconds. Whole seconds are compared: servers may round.
    """
    told = ""
    for pause in (*pauses, None):
        try:
            opened = os.open(os.path.join(path, file.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if pause is None:
                raise _unreadable(error) from error
        else:
            status = os.fstat(opened)
            same = status.st_mtime_ns // 10**9 == file.mtime_ns // 10**9
            if status.st_size == file.size and same:
                return opened
            os.close(opened)
            told = f"{status.st_size} bytes of {time.ctime(status.st_mtime)}"
        if pause is not None:
            time.sleep(pause)
    raise StorageError(
        f"{path}/{file.name} has {told} on this node, and on the head node"
        f" {file.size} bytes of {time.ctime(file.mtime_ns / 1e9)}",
        hint="is the model still being copied there? Launch again when it is complete",
    )


def read_at(descriptor: int, buffer: memoryview, offset: int, file: SourceFile) -> None:
    """Fill `buffer` from a file. Raises StorageError when the file ends before, or can't be read."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise _unreadable(error, file.name) from error
        if count == 0:
            raise StorageError(
                f"{file.name} of the model became shorter while it was staged",
                hint="is somebody writing to it? Launch again when it is complete",
            )
        done += count


def _unreadable(error: OSError, name: str | None = None) -> StorageError:
    # Before the path of the error, if it has one.
    colon = ":" if error.filename else ""
    doing = f"read the model{f' ({name})' if name else ''} to stage it{colon}"
    return storage_error(
        error, doing, hint="look at that path on this node; engines could not read it either"
    )
