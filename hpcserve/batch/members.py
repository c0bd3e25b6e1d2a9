"""Who works on a batch: each driver is a member, and members tell which others still live.

It only saves work: what a member was doing is done by others once it is known to be dead, and whoever is
wrongly taken for dead loses nothing but time. Slurm is asked about its jobs. Elsewhere a process of this host
is looked up, and one of another host is alive while its file is touched, by the file system's own clock:
those of hosts may differ by minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from ..errors import SlurmError
from . import disk

_STALE = 120.0
"""Seconds without a beat after which a member of another host is dead."""

AskSlurm = Callable[[str], bool | None]
"""Is this job running? None: nobody can say."""


class Member(msgspec.Struct, frozen=True):
    """One driver process."""

    name: str
    host: str
    pid: int
    started: int
    """Of the process, in clock ticks since its host's boot."""
    slurm_job: str | None
    restarts: int
    """Times that Slurm had requeued the job."""


class Members:
    """All drivers of one batch, as one of them sees them."""

    def __init__(self, directory: Path, me: Member, ask_slurm: AskSlurm) -> None:
        self._directory = directory
        self.me = me
        self._ask_slurm = ask_slurm
        self._asked: dict[str, bool | None] = {}
        """Slurm's last word on a job."""

    def join(self) -> None:
        """Raises StorageError."""
        disk.write_whole(self._directory / self.me.name, msgspec.json.encode(self.me))

    def beat(self) -> None:
        """Show that this one lives; to be called twice a minute. Raises StorageError."""
        try:
            os.utime(self._directory / self.me.name)
        except OSError as error:
            raise disk.failed(error, "touch") from error

    def refresh(self) -> None:
        """Ask Slurm about the jobs of all others. It may take a minute to answer. Raises StorageError."""
        for name in self._names():
            other = self._read(name)
            if other is not None and other.slurm_job not in (None, self.me.slurm_job):
                self._asked[other.slurm_job] = self._ask_slurm(other.slurm_job)

    def alive(self, name: str) -> bool:
        """Is the member of this name at work, by what Slurm said when it was asked last? Raises
        StorageError."""
        if name == self.me.name:
            return True
        other = self._read(name)
        if other is None:
            return False
        if other.slurm_job is not None:
            if other.slurm_job == self.me.slurm_job:
                return False  # one driver per job: this is the one now
            said = self._asked.get(other.slurm_job)
            if said is not None:
                return said
        if other.host == self.me.host:
            return started(other.pid) == other.started
        return self._beats(name)

    def living(self) -> list[str]:
        """The names of those at work, this one included. Raises StorageError."""
        return sorted(name for name in self._names() if self.alive(name))

    def leave(self) -> None:
        """Raises StorageError."""
        try:
            (self._directory / self.me.name).unlink(missing_ok=True)
        except OSError as error:
            raise disk.failed(error, "remove") from error

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self._directory) if not entry.name.startswith(".")]
        except OSError as error:
            raise disk.failed(error, "read") from error

    def _read(self, name: str) -> Member | None:
        try:
            return msgspec.json.decode((self._directory / name).read_bytes(), type=Member)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        except OSError as error:
            raise disk.failed(error, "read") from error

    def _beats(self, name: str) -> bool:
        self.beat()
        try:
            mine = os.stat(self._directory / self.me.name).st_mtime
            return mine - os.stat(self._directory / name).st_mtime < _STALE
        except FileNotFoundError:
            return False
        except OSError as error:
            raise disk.failed(error, "read") from error


def this_process(environ: Mapping[str, str]) -> Member:
    """The member that this process is."""
    host, pid = os.uname().nodename, os.getpid()
    job = environ.get("SLURM_JOB_ID")
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    begun = started(pid) or 0
    name = f"{job or 'local'}.{restarts}-{host}-{pid}-{begun}"
    return Member(name, host, pid, begun, job, restarts)


def started(pid: int) -> int | None:
    """When a process of this host began; None when it is no more. See proc(5), field 22 of `stat`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def ask_slurm(job: str) -> bool | None:
    """Is this Slurm job running? None when Slurm can't be asked."""
    from ..slurm import get

    try:
        state = get("slurm").state([job])[job]
    except (SlurmError, KeyError):
        return None
    return None if state.phase == "gone" else not state.over
