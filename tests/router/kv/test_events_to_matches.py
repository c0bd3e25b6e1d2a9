"""From engines' caches to placement: real events, and a tokenizer the router doesn't know."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcserve.engines.fake_server import tokens
from hpcserve.engines.kv_events import endpoints
from hpcserve.engines.kv_events.reader import KvEventReader
from hpcserve.engines.kv_events.units import UNIT
from hpcserve.router.demand import Demand
from hpcserve.router.kv.residency import Residency
from hpcserve.router.prompt import Prompts
from tests.fake_engine.running import FakeEngine
from tests.patience import DEADLINE

WORDS = [f"{a}{b}" for a in ("ba", "ki", "lo", "mu", "ne") for b in ("ran", "sel", "tip", "vok", "zun")]


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-") as directory:
        yield Path(directory)


class Cluster:
    """Two aggregated engines, and what a router would know of them."""

    def __init__(self, scratch: Path, *flags: str) -> None:
        self.engines: dict[str, FakeEngine] = {}
        self.readers: list[KvEventReader] = []
        self.changed = asyncio.Event()
        self.residency = Residency()
        self.prompts = Prompts(["toy"])
        for name in ("one", "two"):
            home = scratch / name
            home.mkdir(mode=0o700)
            config = json.dumps(endpoints.config(str(home)))
            self.engines[name] = FakeEngine(scratch / f"{name}.log", "--kv-events-config", config, *flags)
        for name, engine in self.engines.items():
            assert engine.url
            reader = KvEventReader(
                endpoints.in_directory(str(scratch / name)),
                worker=name,
                warn=lambda message, hint: pytest.fail(message),
                changed=self.changed,
                ask_every=0.2,
            )
            reader.start()
            self.readers.append(reader)

    def demand(self, body: dict[str, Any]) -> Demand:
        exchange = SimpleNamespace(path="/v1/chat/completions", header=lambda name: None)
        call: Any = SimpleNamespace(body=json.dumps(body).encode(), exchange=exchange, fields=None)
        return self.prompts.demand(call)

    async def send(self, name: str, body: dict[str, Any]) -> Demand:
        """A request as the router sends it on, and what it learns from the answer."""
        demand = self.demand(body)
        response = await asyncio.to_thread(
            self.engines[name].post,
            "/v1/chat/completions",
            {**body, "stream": True, "return_token_ids": True},
        )
        first = next(line for line in response.text.splitlines() if "prompt_token_ids" in line)
        ids = json.loads(first.removeprefix("data: "))["prompt_token_ids"]
        assert ids == tokens.encode(tokens.chat_prompt(body["messages"]))
        self.residency.learn(demand, json.dumps(ids)[1:-1].encode())
        self.prompts.learn(demand, len(ids), 1)
        return demand

    async def held(self, body: dict[str, Any], expected: set[str]) -> dict[str, int]:
        """Chunks by worker, once just these workers hold the prompt's beginning."""
        demand = self.demand(body)
        async with asyncio.timeout(DEADLINE):
            while True:
                for reader in self.readers:
                    for message in reader.news():
                        self.residency.apply(message, now=0.0)
                found = self.residency.matches(demand.chain, now=0.0)
                if found.keys() == expected and self.residency.live == {"one", "two"}:
                    return {name: match.chunks for name, match in found.items()}
                self.changed.clear()
                await self.changed.wait()

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        for engine in self.engines.values():
            engine.stop()


@pytest.fixture
async def cluster(scratch: Path) -> AsyncIterator[Cluster]:
    made = Cluster(scratch, "--kv-blocks", "640", "--max-model-len", "8192")
    yield made
    made.close()


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"model": "toy", "messages": messages, "max_tokens": 4}


async def test_a_shared_prefix_is_found_where_it_is_until_it_is_evicted(
    cluster: Cluster,
) -> None:
    shared = text(1, 1000)
    await cluster.send("two", chat(shared + text(2, 200)))
    found = await cluster.held(chat(shared + text(3, 200)), {"two"})
    whole = len(cluster.demand(chat(shared)).chain)
    assert whole - 2 <= found["two"] <= whole
    await cluster.send("one", chat(text(4, 1000)))
    assert (await cluster.held(chat(shared + text(5, 200)), {"two"})) == found
    # Other prompts fill the cache of 640 blocks: the engine says what it drops.
    for seed in range(10, 20):
        await cluster.send("two", chat(text(seed, 1000)))
    await cluster.held(chat(shared + text(6, 200)), set())


async def test_the_next_turn_of_a_conversation_finds_the_whole_last_one(cluster: Cluster) -> None:
    opening, answer, question = text(1, 600), text(2, 100), text(3, 50)
    first = await cluster.send("one", chat(opening))
    found = await cluster.held(chat(opening, answer, question), {"one"})
    assert len(first.chain) - 1 <= found["one"] <= len(first.chain)


async def test_a_cleared_cache_is_empty_at_once(cluster: Cluster) -> None:
    await cluster.send("one", chat(text(1, 600)))
    await cluster.held(chat(text(1, 600)), {"one"})
    await asyncio.to_thread(cluster.engines["one"].post, "/reset_prefix_cache")
    await cluster.held(chat(text(1, 600)), set())


async def test_estimates_come_close_to_the_tokenizers_counts(cluster: Cluster) -> None:
    for seed in range(60):
        demand = await cluster.send("one", chat(text(seed, 300)))
    actual = len(tokens.encode(tokens.chat_prompt(chat(text(seed, 300))["messages"])))
    assert abs(demand.prompt_tokens - actual) < 0.1 * actual
    assert actual > UNIT
