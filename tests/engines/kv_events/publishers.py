"""Publishers of KV events for tests: the fake engine's own, and what readers see of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcserve.engines.fake_server.kv_events import KVEventPublisher
from hpcserve.engines.kv_events.endpoints import EventEndpoint
from hpcserve.engines.kv_events.messages import KvMessage, unpack
from hpcserve.engines.kv_events.reader import KvEventReader
from hpcserve.engines.kv_events.units import space, token_bytes, units_of
from tests.patience import DEADLINE

BLOCK = 64


class Engine:
    """What a fake engine publishes, without the engine."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = EventEndpoint(events=f"ipc://{directory}/e", replay=f"ipc://{directory}/r")
        self.start()

    def start(self) -> None:
        self.publisher = KVEventPublisher(self.endpoint.events, self.endpoint.replay)
        self.publisher.start()
        self.prompts = 0

    def close(self) -> None:
        self.publisher.close()

    def store(self, *, lost: bool = False) -> list[int]:
        """Publish the blocks of a new prompt; returns its units. `lost`: nobody hears it."""
        self.prompts += 1
        tokens = [self.prompts * 1000 + i for i in range(4 * BLOCK)]
        names = [self.prompts * 10 + i for i in range(4)]
        event = {
            "type": "BlockStored", "block_hashes": names, "parent_block_hash": None, "token_ids": tokens,
            "block_size": BLOCK, "lora_id": None, "medium": "GPU", "lora_name": None,
        }  # fmt: skip
        self.publish(event, lost=lost)
        return units_of(token_bytes(tokens), space())

    def remove(self, prompt: int) -> None:
        names = [prompt * 10 + i for i in range(4)]
        self.publish({"type": "BlockRemoved", "block_hashes": names, "medium": "GPU"})

    def publish(self, event: dict[str, Any], *, lost: bool = False) -> None:
        socket = self.publisher._publisher
        if lost:
            self.publisher._publisher = _Nowhere()  # type: ignore[assignment]
        try:
            self.publisher.publish([event])
        finally:
            self.publisher._publisher = socket


class _Nowhere:
    def send_multipart(self, frames: Any) -> None:
        pass


class Follower:
    """A reader, and the units it has told of."""

    def __init__(self, *endpoints: EventEndpoint, ask_every: float = 0.2, patience: float = 5.0) -> None:
        self.warnings: list[str] = []
        self.reader = KvEventReader(
            endpoints,
            worker="decode-0",
            generation=1,
            warn=lambda message, hint: self.warnings.append(message),
            ask_every=ask_every,
            patience=patience,
        )
        self.units: set[int] = set()
        self.live = False
        self.clears = 0
        self.messages: list[KvMessage] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                await self.reader.changed.wait()
                self.reader.changed.clear()
                self.take()

    async def joined(self, engine: Engine) -> set[int]:
        """Publish prompts until all are known: only then has the subscription surely arrived."""
        stored: set[int] = set()
        async with asyncio.timeout(DEADLINE):
            while not stored or not stored <= self.units:
                stored |= set(engine.store())
                await asyncio.sleep(0.02)
                self.take()
        return stored

    def take(self) -> None:
        for message in self.reader.news():
            self.messages.append(message)
            for name, _, packed in message.ops:
                if name == "clear":
                    self.units.clear()
                    self.clears += 1
                elif name == "store":
                    self.units.update(unpack(packed))
                elif name == "drop":
                    self.units.difference_update(unpack(packed))
                else:
                    self.live = name == "live"
