"""events.jsonl: what happened in a run, in order. Only the head node writes it; anyone may read.

One line is one event: {"t": unix seconds, "event": name, …}. Names and their fields:

    job-started     node, slurm_job_id, end_time           the head node's script runs
    rank-joined     rank, node                             seen in ranks/
    rendezvous      transport, ranks, seconds              the roster is complete
    preflight       pairs, failed, over_nvlink, unmeasured, seconds, starting, slowest
                                                           what NIXL moved before any model was loaded
    staging         bytes, total, rate                     of the node that has least; rate in bytes/s
    staged          path, bytes, seconds, read, nodes, reused
                                                           path null: engines load from the shared one;
                                                           read: bytes from the shared file system, all nodes;
                                                           reused: nodes that had it
    warning         message, hint                          something is degraded, and what to do
    engine-starting replica, node
    engine-loading  replica, progress                      from the engine's own log
    engine-ready    replica, url, seconds                  it answers /health
    engine-died     replica, cause, message, hint, restart_in
    kv-path         prefill, decode, bytes, seconds, ok, error
                                                           one real generation, KV bytes counted
    worker-in       replica                                takes requests from now on
    worker-out      replica, reason                        takes none any more
    first-token     seconds                                through the router
    ready           seconds, url
    draining        reason, until
    failed          message, hint, exit_code
    stopped         reason
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .atomic import file_mode, storage_error

Event = dict[str, Any]


class EventLog:
    """Appends events; each line is one write, so a reader never sees half of one but the last."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.fchmod(self._file, file_mode(path.parent))  # whatever the umask of the job
        except OSError as error:
            raise storage_error(error, "write") from error
        self._torn = False

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Raises StorageError when the disk is full."""
        line = (json.dumps({"t": round(time.time(), 3), "event": event, **fields}) + "\n").encode()
        try:
            written = os.write(self._file, b"\n" * self._torn + line)
            # A full disk takes a part of it; the next event must not stand on the same line.
            self._torn = written < self._torn + len(line)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage_error(error, "append to the event log") from error

    def close(self) -> None:
        os.close(self._file)


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Whole events from byte `offset`, each with the offset behind it. A torn last line waits.

    Lines that are no events are passed over: a disk that was full for a moment leaves one that is cut.
    Raises StorageError when the file can't be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                event = _event(line)
                if event is not None:
                    yield event, offset
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "read") from error


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and "event" in event and isinstance(event.get("t"), int | float)
    return event if whole else None
