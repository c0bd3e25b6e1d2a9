"""Every write, fsync, rename and link that the batch's exactness rests on: what must last is written here
alone.

Tests fail and kill at each of these calls. All errors come out as StorageError, with the run left so that the
same command goes on.
"""

from __future__ import annotations

import errno
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageError
from ..rundir.atomic import storage_error

if TYPE_CHECKING:
    # collections.abc has it from Python 3.12.
    from typing_extensions import Buffer

_WRITABLE = "make it writable, or give another directory with -o"
_HINTS = {
    errno.ENOSPC: "free space there; then give the same command again, and it goes on where it stopped",
    errno.EDQUOT: "your quota is used up: delete files; then give the same command again, and it goes on",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _WRITABLE),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG), "give another directory with -o"),
    errno.ESTALE: "the file system was mounted anew; give the same command again, and it goes on",
}
_OTHERWISE = "mend that, and give the same command again: it goes on where it stopped"


def failed(error: OSError, doing: str) -> StorageError:
    """What is told of an OSError in a batch's directory."""
    return storage_error(error, doing, hint=_HINTS.get(error.errno or 0, _OTHERWISE))


def create(path: Path) -> int | None:
    """A descriptor that appends to a new file; None when somebody else made it. Raises StorageError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise failed(error, "make") from error


def append(handle: int, data: bytes | bytearray | memoryview, path: Path) -> None:
    """Write all of `data`. Raises StorageError; a part may have been written then."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError as error:
        error.filename = str(path)
        raise failed(error, "write") from error


def sync(handle: int, path: Path) -> None:
    """Returns when what was written is on the disk. Raises StorageError."""
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise failed(error, "write") from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory last. Raises StorageError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise failed(error, "write to") from error


def publish(temporary: Path, path: Path) -> None:
    """Give a whole file, which was synced, its name, in place of what has it. Raises StorageError."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise failed(error, "rename") from error
    sync_directory(path.parent)


def write_new(path: Path, data: bytes) -> bool:
    """A whole file under a name that nobody has yet; False when somebody has it. Raises StorageError.

    A file that is linked is there with all its content or not at all, on NFS as well.
    """
    temporary = _write_beside(path, data)
    try:
        try:
            os.link(temporary, path)
        except OSError as error:
            # NFS repeats a call whose answer was lost: the second one finds what the first one made.
            if not _same(temporary, path):
                if isinstance(error, FileExistsError):
                    return False
                raise failed(error, "make") from error
        sync_directory(path.parent)
        return True
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_whole(path: Path, data: bytes) -> None:
    """A whole file, in place of what has its name. Raises StorageError."""
    temporary = _write_beside(path, data)
    try:
        publish(temporary, path)
    except StorageError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _write_beside(path: Path, data: bytes) -> Path:
    """A file that is on the disk, under a name of this process's own. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise failed(error, "make") from error
    try:
        append(handle, data, temporary)
        sync(handle, temporary)
    except StorageError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    return temporary


class NewFile(io.RawIOBase):
    """A file that is written from its beginning; an older one of its name is replaced. Raises OSError."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        return os.write(self._handle, data)

    def fsync(self) -> None:
        """Returns when what was written is on the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._handle)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
