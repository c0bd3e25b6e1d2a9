"""Whether a file is a whole container image: what its first bytes say about it, held against its size.

SIF: github.com/apptainer/sif, pkg/sif/sif.go. A header of 128 bytes, little endian: launch script 32,
magic 10, version 3, architecture 3, UUID 16, then numbers of 8 bytes: created, modified, descriptors free
and total, and offset and length of descriptors and of data. squashfs 4: the kernel's
fs/squashfs/squashfs_fs.h, magic `hsqs`, the file system's length at byte 40.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Literal

from ..errors import StorageError

_SIF = struct.Struct("<32s10s3s3s16s8q")
_SIF_MAGIC = b"SIF_MAGIC\x00"
_SIF_ARCHITECTURES = {b"02": "x86_64", b"04": "aarch64"}
_SQUASHFS = struct.Struct("<4s36xq")
_AGAIN = "remove it and run `hpcserve image pull` again"


def check_image(path: Path, *, runtime: Literal["pyxis", "apptainer"], arch: str) -> None:
    """Raises StorageError for what is no image of this runtime, is cut off, or is for other processors."""
    wrong = fault(path, runtime=runtime, arch=arch)
    if wrong is not None:
        raise StorageError(f"the image {path} {wrong}", hint=_AGAIN)


def fault(path: Path, *, runtime: Literal["pyxis", "apptainer"], arch: str) -> str | None:
    """What is wrong with the file, in words that follow its name; None if nothing. Raises StorageError."""
    try:
        with path.open("rb") as file:
            head = file.read(_SIF.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StorageError(f"can't read the image {path}: {error.strerror}", hint=_AGAIN) from error
    return _sif(head, size, arch) if runtime == "apptainer" else _squashfs(head, size)


def _sif(head: bytes, size: int, arch: str) -> str | None:
    if len(head) < _SIF.size or head[32:42] != _SIF_MAGIC:
        return "is not a SIF file"
    _, _, _, code, _, _, _, _, _, _, _, data_at, data_length = _SIF.unpack(head)
    if data_at + data_length > size:
        return f"is cut off: it has {size} bytes and should have {data_at + data_length}"
    made_for = _SIF_ARCHITECTURES.get(code.rstrip(b"\x00"))
    if made_for is not None and made_for != arch:
        return f"is for {made_for}, and the site's nodes are {arch}"
    return None


def _squashfs(head: bytes, size: int) -> str | None:
    if len(head) < _SQUASHFS.size or head[:4] != b"hsqs":
        return "is not a squashfs file"
    _, length = _SQUASHFS.unpack(head[: _SQUASHFS.size])
    if length > size:
        return f"is cut off: it has {size} bytes and should have {length}"
    return None
