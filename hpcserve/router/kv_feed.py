"""KV events of engines that no agent reads: the supervisor of a router that runs alone does it itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ..engines.kv_events.endpoints import EventEndpoint
from ..errors import ConfigError
from .control import KVEvents

log = logging.getLogger(__name__)

_GATHER = 0.02
"""Seconds in which events are collected into one message."""


class KvFeed:
    """Reads the events of each worker, and hands on what relays should hear."""

    def __init__(
        self, endpoints: Mapping[str, Iterable[EventEndpoint]], tell: Callable[[KVEvents], None]
    ) -> None:
        """`endpoints`: worker's name -> one for each data-parallel rank. Raises ConfigError."""
        # ZMQ takes memory, and most supervisors have no use for it.
        from ..engines.kv_events.reader import KvEventReader

        self._tell = tell
        self._changed = asyncio.Event()
        self._readers = {}
        for worker, places in endpoints.items():
            try:
                self._readers[worker] = KvEventReader(
                    tuple(places), worker=worker, warn=_warn, changed=self._changed
                )
            except ValueError as error:
                self.close()
                raise ConfigError(
                    f"{worker}'s KV events can't be read: {error}",
                    hint="an endpoint is ipc:///PATH or tcp://HOST:PORT",
                ) from error

    async def run(self) -> None:
        """Until cancelled."""
        for reader in self._readers.values():
            reader.start()
        try:
            while True:
                for worker, reader in self._readers.items():
                    for message in reader.news():
                        self._tell(KVEvents(worker=worker, batch=msgspec.Raw(msgspec.json.encode(message))))
                await self._changed.wait()
                await asyncio.sleep(_GATHER)
                self._changed.clear()
        finally:
            self.close()

    def start_over(self) -> None:
        """A relay has missed something, or is new: tell everything again."""
        for reader in self._readers.values():
            reader.start_over()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


def _warn(message: str, hint: str) -> None:
    log.warning("%s (%s)", message, hint)
