"""Reads one engine's KV events, of all its data-parallel ranks, into messages for routers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq.asyncio

from .digest import Digest
from .endpoints import EventEndpoint
from .messages import KvMessage, News
from .source import ASK_EVERY, PATIENCE, Publisher


class KvEventReader:
    """Reads until `close()`. `changed` is set when `news()` has some.

    `endpoints` has one entry for each data-parallel rank. Use it in one event loop.
    """

    def __init__(
        self,
        endpoints: Sequence[EventEndpoint],
        *,
        worker: str,
        generation: int = 0,
        source: int = 0,
        warn: Callable[[str, str], None],
        changed: asyncio.Event | None = None,
        ask_every: float = ASK_EVERY,
        patience: float = PATIENCE,
    ) -> None:
        """Raises ValueError for an address ZMQ doesn't understand. `warn(message, hint)`: for people."""
        self.changed = changed or asyncio.Event()
        self._worker = worker
        self._warn = warn
        self._digest = Digest()
        self._news = News(worker, generation=generation, source=source)
        self._context = zmq.asyncio.Context()
        self._publishers: list[Publisher] = []
        self._tasks: list[asyncio.Task[None]] = []
        try:
            for rank, endpoint in enumerate(endpoints):
                self._publishers.append(
                    Publisher(
                        endpoint.events,
                        endpoint.replay,
                        context=self._context,
                        digest=self._digest,
                        rank=rank,
                        warn=lambda message, hint: warn(f"KV events of {worker}: {message}", hint),
                        changed=self.changed.set,
                        ask_every=ask_every,
                        patience=patience,
                    )
                )
        except ValueError:
            self.close()
            raise
        self._fresh = True

    @property
    def live(self) -> bool:
        """Are all its publishers followed?"""
        return all(publisher.live for publisher in self._publishers)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(publisher.run()) for publisher in self._publishers]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        self.changed.set()

    def news(self) -> list[KvMessage]:
        """What routers should hear since the last call; the first time, everything."""
        anew, self._fresh = self._fresh, False
        changes = self._digest.snapshot() if anew else self._digest.changes()
        return self._news.of(changes, live=self.live, anew=anew)

    def start_over(self) -> None:
        """A router has missed something: the next `news()` are everything there is."""
        self._fresh = True
        self.changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A bug here must not look like an engine with nothing to say."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._warn(f"KV events of {self._worker}: reading them failed: {error!r}", "this is a bug")

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for publisher in self._publishers:
            publisher.close()
        self._context.destroy(linger=0)
