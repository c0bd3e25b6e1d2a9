"""Children of an engine that are in no group of its own, and would outlive it when the group is killed.

Apptainer starts the process that mounts an image file (squashfuse) in a session of its own, and ends it
itself, unless it is killed.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


class Strays:
    """Children of `parent`, which leads a process group, outside that group.

    They are held by handles: a number may be another process's when they are killed.
    """

    def __init__(self, parent: int) -> None:
        self._handles: list[int] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            above, group = int(fields[1]), int(fields[2])
            if above == parent and group != parent:
                with suppress(ProcessLookupError):
                    self._handles.append(os.pidfd_open(int(entry.name)))

    def kill(self) -> None:
        """SIGKILL to those that still live."""
        for handle in self._handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
        self._handles.clear()
