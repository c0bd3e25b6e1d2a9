"""Lines of JSON over inherited socket pairs: head node to supervisor, and supervisor to each relay.

Downwards go the messages below. Upwards, as `{"type": …}`:
- to the head: `listening`, `stats`, `suspect`, `kv_missing`;
- to the supervisor: `ready`, `stats` (the answer to a poll), `drained`, `suspect`, `kv_missing`, `kv_shared`
  for the other relays, `usage` for the ledger, `gather` and `snapshot`.
The end of a line means that the other side is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

import msgspec

from .config import WorkerSpec
from .kv.messages import SharedMessage

log = logging.getLogger(__name__)

_UNREAD_MAX = 1024 * 1024
_LINE_LIMIT = 16 * 1024 * 1024
State = Literal["starting", "ready", "draining"]
Json = dict[str, Any]
M = TypeVar("M")


class Table(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="workers"):
    """Which workers are in rotation, and whether the run takes requests."""

    state: State
    workers: tuple[WorkerSpec, ...] = ()
    reason: str | None = None
    retry_after: int | None = None
    """Seconds."""
    end_time: float | None = None
    """When the walltime ends, as a Unix time."""


class Drain(msgspec.Struct, frozen=True, tag_field="type", tag="drain"):
    """Take nothing new, finish what runs, exit."""


class Reload(msgspec.Struct, frozen=True, tag_field="type", tag="reload"):
    """Read the files of keys and certificates again."""


class KVEvents(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kv_events"):
    """What a worker's KV cache took in and dropped; relays read `batch`, the supervisor does not."""

    worker: str
    batch: msgspec.Raw


class Facts(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="facts"):
    """What engines say of themselves: worker -> fields of placement.facts.EngineFacts."""

    facts: Mapping[str, Mapping[str, int | float | None]]


class Totals(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="totals"):
    """Tokens that keys have used in all runs, by key id."""

    totals: Mapping[str, int]


class Poll(msgspec.Struct, frozen=True, tag_field="type", tag="poll"):
    """Asks a relay for its `stats`."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ask"):
    """Asks a relay for its `snapshot(query)`, for the relay that gathers them under this number."""

    number: int
    query: Json = {}


class Gathered(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="gathered"):
    """The answer to a `gather`: what the other relays said."""

    number: int
    parts: tuple[Json, ...]


class Leave(msgspec.Struct, frozen=True, tag_field="type", tag="leave"):
    """Exit: all relays are `drained`. Until then each still tells clients that the endpoint drains."""


class Force(msgspec.Struct, frozen=True, tag_field="type", tag="force"):
    """Exit now, whatever runs."""


FromHead = Table | Drain | Reload | KVEvents
FromSupervisor = FromHead | Facts | Totals | SharedMessage | Poll | Ask | Gathered | Leave | Force


class Control(Generic[M]):
    """One end of a line: reads messages of the types of `decoder`, sends ours."""

    def __init__(
        self,
        on_message: Callable[[M], None],
        on_end: Callable[[], None],
        decoder: msgspec.json.Decoder[M],
        *,
        other: str = "head node",
    ) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._decoder = decoder
        self._other = other
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        reader, self._writer = await asyncio.open_unix_connection(sock=sock, limit=_LINE_LIMIT)
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                try:
                    message = self._decoder.decode(line)
                except msgspec.MsgspecError as error:
                    log.error("a message of the %s is not understood: %s", self._other, error)
                else:
                    self._on_message(message)
        except (OSError, ValueError) as error:
            log.error("reading from the %s failed: %s", self._other, error)
        self._on_end()

    def send(self, message: Any) -> None:
        """Queue a message; dropped once the other side is gone, or while it reads none of them."""
        if self.unread < _UNREAD_MAX:
            self.insist(message)

    def insist(self, message: Any) -> None:
        """Queue a message that may not be dropped, however little the other side reads."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    @property
    def unread(self) -> int:
        """Bytes the other side has not taken."""
        return 0 if self._writer is None else self._writer.transport.get_write_buffer_size()

    async def ended(self) -> None:
        """Returns when all that the other side said before it went has been heard."""
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.drain()
            self._writer.close()
