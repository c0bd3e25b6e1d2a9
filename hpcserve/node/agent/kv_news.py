"""Reads the KV events of a node's engines and passes on what changed to the controller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from ...engines.kv_events.endpoints import EventEndpoint
from ...engines.kv_events.messages import KvMessage
from ...engines.kv_events.reader import KvEventReader
from ..console import warn

COALESCE = 0.03
"""Seconds in which changes gather."""
_LOOK = 0.25
_RETRY = 1.0
_MOST_MESSAGES = 256
"""In one call, of 170 KB at most: what is more goes with the next."""


class Followed(Protocol):
    """A replica's process on this node."""

    name: str

    @property
    def ready_generation(self) -> int | None:
        """The start that answers requests now; None while none does."""
        ...


class KvNews:
    """`run()` until cancelled. `followed`: each process with the workers whose events it publishes. `send`
    takes a batch to the controller and is False when it did not get it."""

    def __init__(
        self,
        rank: int,
        followed: Sequence[tuple[Followed, Mapping[str, Sequence[EventEndpoint]]]],
        send: Callable[[list[tuple[str, KvMessage]]], Awaitable[bool]],
    ) -> None:
        self._rank = rank
        self._followed = [
            (replica, worker, endpoints)
            for replica, workers in followed
            for worker, endpoints in workers.items()
        ]
        self._send = send
        self._readers: dict[str, tuple[int, KvEventReader]] = {}
        self._changed = asyncio.Event()
        self._round: Any = None

    def round(self, number: Any) -> None:
        """The controller counts up when routers need to hear everything again."""
        if number != self._round:
            self._round = number
            self._start_over()

    async def run(self) -> None:
        if not self._followed:
            return
        try:
            while True:
                self._follow()
                try:
                    async with asyncio.timeout(_LOOK):
                        await self._changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(COALESCE)
                self._changed.clear()
                if not await self._tell():
                    # What was in it is told again, with everything else.
                    await asyncio.sleep(_RETRY)
                    self._start_over()
        finally:
            for _, reader in self._readers.values():
                reader.close()

    async def _tell(self) -> bool:
        news = [(name, message) for name, (_, reader) in self._readers.items() for message in reader.news()]
        for at in range(0, len(news), _MOST_MESSAGES):
            if not await self._send(news[at : at + _MOST_MESSAGES]):
                return False
        return True

    def _follow(self) -> None:
        """Read each engine that is ready, and only those."""
        for replica, name, endpoints in self._followed:
            generation = replica.ready_generation
            if name in self._readers and self._readers[name][0] != generation:
                self._readers.pop(name)[1].close()
            if generation is not None and name not in self._readers:
                reader = KvEventReader(
                    endpoints,
                    worker=name,
                    generation=generation,
                    source=self._rank,
                    warn=warn,
                    changed=self._changed,
                )
                reader.start()
                self._readers[name] = (generation, reader)

    def _start_over(self) -> None:
        for _, reader in self._readers.values():
            reader.start_over()
