"""The router as the head's child: started, told the worker table over a socket pair, started again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...errors import JobError, StorageError
from ...rundir.atomic import file_mode, storage_error, write_json
from ...rundir.logs import last_error
from ..console import warn

_LINE_LIMIT = 16 << 20
_UNREAD_MAX = 32 << 20
_END = 10.0
"""Seconds the router may take to end once the control socket is closed."""
_TOLD = 0.5
"""Seconds until a signal that ended the router has surely reached this process as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """What the router last said about itself."""

    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    tables: int = 0
    """Worker tables that all its processes know."""
    workers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class KvEnvelope(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kv_events"):
    """As the router's control line has it."""

    worker: str
    batch: msgspec.Raw


class RouterProcess:
    """One router. `run()` restarts it with back-off until `close()`."""

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        config_path: Path,
        log: Path,
        on_listening: Callable[[str, int], None],
        on_suspect: Callable[[str, str], None],
        on_death: Callable[[int], None],
        ending: Callable[[], bool],
    ) -> None:
        self._config = dict(config)
        self._config_path = config_path
        self._log = log
        self._on_listening = on_listening
        self._on_suspect = on_suspect
        self._on_death = on_death
        self._ending = ending
        """True once the run is to end: a router that is gone then is not missed."""
        self._table: Mapping[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._closing = False
        self._listened = False
        self.kv_round = 0
        """Counts up when the router must hear everything about KV caches again."""
        self._told = 0
        """Tables sent to the process that runs."""
        self.stats = RouterStats()
        self.reports = 0
        """Stats messages so far: two more mean that the counts are newer than now."""

    @property
    def alive(self) -> bool:
        """Is there a router process?"""
        return self._process is not None

    @property
    def knows(self) -> bool:
        """Every process of the router has the last table."""
        return self.alive and self.stats.tables >= self._told

    def tell(self, table: Mapping[str, Any]) -> None:
        """Send a worker table; a router that starts later gets the last one."""
        self._table = table
        self._told += 1
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(msgspec.json.encode({"type": "workers", **table}) + b"\n")

    def tell_kv(self, worker: str, message: msgspec.Raw) -> None:
        """Pass on news about a worker's KV cache; when that can't be, `kv_round` asks for all of it anew."""
        if self._writer is None or self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _UNREAD_MAX:
            self.kv_round += 1
            return
        self._writer.write(msgspec.json.encode(KvEnvelope(worker=worker, batch=message)) + b"\n")

    async def run(self) -> None:
        """Until `close()`.

        Raises JobError when the router itself says that it can't start, as when its port is taken,
        and StorageError when its files can't be written.
        """
        delay = 0.2
        while not self._closing:
            began = asyncio.get_running_loop().time()
            status = await self._live_once()
            if status == 0:
                # It was told to end, and perhaps so were we: `scancel` reaches all processes of the job.
                await asyncio.sleep(_TOLD)
            if self._closing or self._ending():
                return
            if status > 0 and not self._listened:
                raise self._never_started(status)
            self._on_death(status)
            if asyncio.get_running_loop().time() - began > 30:
                delay = 0.2
            await asyncio.sleep(delay)
            delay = min(delay * 2, 10.0)

    def _never_started(self, status: int) -> JobError:
        said = last_error(self._log)
        if said is None:
            return JobError(f"the router ended with status {status}", hint="logs/router.log says why")
        return JobError(f"the router can't start: {said.message}", hint=said.hint)

    async def _live_once(self) -> int:
        self._write_config()
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._start(theirs)
        self._process = process
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_LIMIT)
        self._writer = writer
        try:
            self._told = 0
            if self._table is not None:
                self.tell(self._table)
            async for line in reader:
                self._take(msgspec.json.decode(line))
        except (ConnectionError, msgspec.DecodeError) as error:
            warn(f"the router's control socket broke: {error}")
        finally:
            self._writer = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            status = await self._reap(process)
            self._process = None
            self.stats = RouterStats()
        return status

    def _write_config(self) -> None:
        try:
            write_json(self._config_path, self._config)
        except StorageError as error:
            if not self._config_path.exists():
                raise
            # From its last start: only the port may differ, and clients are told when it does.
            warn(f"the router starts with its earlier configuration: {error.message}", error.hint)

    def _start(self, control: socket.socket) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "hpcserve.router",
            "--config", str(self._config_path), "--control-fd", str(control.fileno()),
        ]  # fmt: skip
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, file_mode(self._log.parent))
        except OSError as error:
            found = storage_error(error, "write the router's log")
            warn(f"{found.message}; the router runs without one", found.hint)
            log = os.open(os.devnull, os.O_WRONLY)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(control.fileno(),),
                # Signals to the job's group are the head's business: it drains the router itself.
                start_new_session=True,
            )
        except OSError as error:
            raise JobError(f"can't start the router: {error.strerror}") from error
        finally:
            os.close(log)

    def _take(self, message: Mapping[str, Any]) -> None:
        match message.get("type"):
            case "listening":
                # A restarted router must come back where the clients expect it.
                self._config["port"] = message["port"]
                self._listened = True
                self.kv_round += 1
                self._on_listening(str(message["host"]), int(message["port"]))
            case "stats":
                self.stats = msgspec.convert(
                    {key: value for key, value in message.items() if key != "type"}, RouterStats
                )
                self.reports += 1
            case "kv_missing":
                self.kv_round += 1
            case "suspect":
                self._on_suspect(str(message["worker"]), str(message.get("reason", "")))

    async def close(self) -> None:
        """Close the control socket, which ends the router; kill it if it stays."""
        self._closing = True
        if self._writer is not None:
            self._writer.close()
        process = self._process
        if process is not None:
            await self._reap(process)

    async def _reap(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return await asyncio.to_thread(process.wait, _END)
        except subprocess.TimeoutExpired:
            # Its relays are in its process group.
            os.killpg(process.pid, signal.SIGKILL)
            return await asyncio.to_thread(process.wait)
