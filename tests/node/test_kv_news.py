"""The agent reads its engines' KV events and passes on to the controller what changed."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcserve.engines.kv_events.messages import KvMessage
from hpcserve.http.server import serve
from hpcserve.node.agent.kv_news import KvNews
from hpcserve.node.calls import CallFailed, Calls
from hpcserve.node.head.controller import Controller, Desk
from hpcserve.router.control import KVEvents
from hpcserve.router.kv.residency import Residency
from tests.engines.kv_events.publishers import Engine
from tests.patience import DEADLINE


class Replica:
    """A replica's process as the agent has it."""

    name = "decode-0"

    def __init__(self) -> None:
        self.ready_generation: int | None = None


class Node:
    """An agent's news, a controller, and the index of a router behind it."""

    def __init__(self, scratch: Path) -> None:
        self.replica = Replica()
        self.engine = Engine(scratch)
        self.residency = Residency()
        self.calls = Calls("key")
        self.url = ""
        self.heard: list[KvMessage] = []
        self.failing = False
        self.news = KvNews(3, [(self.replica, {self.replica.name: [self.engine.endpoint]})], self._send)

    async def open(self) -> None:
        desk = Desk(heartbeat=lambda beat: {}, kv_news=self._hear, status=dict, drain=_nothing, stop=_nothing)
        self.server = await serve(Controller("key", desk).handle, host="127.0.0.1", port=0)
        self.url = f"http://127.0.0.1:{self.server.port}/agents/3/kv"
        self.task = asyncio.create_task(self.news.run())

    async def _send(self, news: list[tuple[str, KvMessage]]) -> bool:
        if self.failing:
            return False
        await self.calls.json("POST", self.url, {"news": news}, seconds=DEADLINE)
        return True

    def _hear(self, replica: str, message: msgspec.Raw) -> None:
        if replica != "decode-0":
            raise KeyError(replica)
        # As it goes over the control line.
        line = msgspec.json.encode(KVEvents(worker=replica, batch=message))
        batch = msgspec.json.decode(line, type=KVEvents).batch
        self.heard.append(msgspec.json.decode(batch, type=KvMessage))
        self.residency.hear(batch, now=0.0)

    async def until_held(self, units: list[int]) -> None:
        """Wait until the router's index has these units, and these alone."""
        async with asyncio.timeout(DEADLINE):
            while self.held(units) != {"decode-0": 1} or not self.residency.live:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def held(self, units: list[int]) -> dict[str, int]:
        # A chunk of its own for each prompt, which ends with its last unit.
        chain = (units[-1] ^ 1,)
        self.residency._translation.take([(chain[0], units[-1])])
        return {name: match.chunks for name, match in self.residency.matches(chain, now=0.0).items()}

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.engine.close()
        await self.calls.close()
        await self.server.close()


def _nothing() -> None:
    pass


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-") as directory:
        yield Path(directory)


@pytest.fixture
async def node(scratch: Path) -> AsyncIterator[Node]:
    made = Node(scratch)
    await made.open()
    yield made
    await made.close()


async def test_what_engines_cache_reaches_the_router(node: Node) -> None:
    before = node.engine.store()
    node.replica.ready_generation = 1
    await node.until_held(before)
    await node.until_held(node.engine.store())
    assert {message.source for message in node.heard} == {3}
    assert {message.generation for message in node.heard} == {1}
    assert [message.seq for message in node.heard] == list(range(len(node.heard)))


async def test_an_engine_that_is_not_ready_is_not_read(node: Node) -> None:
    node.engine.store()
    await asyncio.sleep(0.6)
    assert not node.heard


async def test_the_next_start_of_an_engine_begins_with_an_empty_cache(node: Node) -> None:
    units = node.engine.store()
    node.replica.ready_generation = 1
    await node.until_held(units)
    node.replica.ready_generation = None
    node.engine.close()
    node.engine.start()
    node.engine.prompts = 50
    node.replica.ready_generation = 2
    await node.until_held(node.engine.store())
    assert node.held(units) == {}


async def test_a_router_that_starts_again_is_told_everything(node: Node) -> None:
    units = node.engine.store()
    node.replica.ready_generation = 1
    node.news.round(1)
    await node.until_held(units)
    node.residency = Residency()
    assert node.held(units) == {}
    node.news.round(2)
    await node.until_held(units)
    heard = len(node.heard)
    node.news.round(2)
    await asyncio.sleep(0.4)
    assert len(node.heard) == heard


async def test_what_a_controller_that_was_away_did_not_hear_is_told_again(node: Node) -> None:
    node.replica.ready_generation = 1
    node.failing = True
    units = node.engine.store()
    await asyncio.sleep(0.5)
    node.failing = False
    await node.until_held(units)


@pytest.mark.parametrize("body", [{}, {"news": 3}, {"news": [["decode-0"]]}, {"news": [["decode-9", {}]]}])
async def test_the_controller_refuses_what_is_no_news(node: Node, body: Any) -> None:
    with pytest.raises(CallFailed, match="40"):
        await node.calls.json("POST", node.url, body, seconds=DEADLINE)
    stranger = Calls("wrong")
    with pytest.raises(CallFailed, match="401"):
        await stranger.json("POST", node.url, {"news": []}, seconds=DEADLINE)
    await stranger.close()
