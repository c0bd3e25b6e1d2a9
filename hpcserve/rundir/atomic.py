"""Files that are either absent or whole, also on NFS and after a crash."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from ..errors import StorageError

_HINTS = {
    errno.ENOSPC: "free space on that file system, or point `storage.runs` of the site at another",
    errno.EDQUOT: "your quota is used up: delete files, or point `storage.runs` of the site elsewhere",
    errno.EACCES: "choose a directory you can write, with `storage.runs` of the site or HPCSERVE_RUNS",
    errno.EROFS: "that file system is read-only here: set HPCSERVE_RUNS to a writable shared directory",
}


_OTHERWISE = "look at that path on this host; `storage.runs` of the site or HPCSERVE_RUNS choose another"


def storage_error(error: OSError, doing: str, *, hint: str | None = None) -> StorageError:
    """Turn an OSError into one sentence and a remedy; `hint` if it is not about the runs directory."""
    reason = error.strerror or str(error)
    path = error.filename or error.filename2
    where = f" {path}" if path else ""
    return StorageError(
        f"can't {doing}{where}: {reason}", hint=hint or _HINTS.get(error.errno or 0, _OTHERWISE)
    )


def file_mode(directory: Path) -> int:
    """Mode of a file in a run directory: for its owner, and for the group the run was shared with.

    Raises OSError. A setgid directory is how `rundir/runs.py` marks a shared run.
    """
    return 0o640 if os.stat(directory).st_mode & stat.S_ISGID else 0o600


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Replace `path` by `text`: temporary file in the same directory, fsync, rename, fsync.

    `mode` is `file_mode` unless given. Raises StorageError; the old content, or no file, is left then.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), file_mode(path.parent) if mode is None else mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise storage_error(error, "write") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, mode: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", mode=mode)


def read_json(path: Path) -> Any:
    """Read a file another node may be replacing: a stale NFS handle is opened again.

    Raises FileNotFoundError when it does not exist (yet) and StorageError for all else.
    """
    for attempt in range(3):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == 2:
                raise storage_error(error, "read") from error
        except ValueError as error:
            raise StorageError(
                f"{path} is not valid JSON: {error}",
                hint="hpcserve replaces its files whole; was this one edited by hand?",
            ) from error
    raise AssertionError("unreachable")
