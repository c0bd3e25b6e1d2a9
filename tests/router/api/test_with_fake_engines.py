"""Fake engines behind the router's real process: counts agree, cached prompts are seen and explained."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpcserve.cli.why_route import decisions, render
from tests.fake_engine.running import FakeEngine

from ..live import LiveRouter, worker

JOB_KEY, KEY = "job-key", "sk-client"
SYSTEM = "You answer in the style of a lighthouse keeper who has read too many manuals. " * 60


class Pair:
    """One prefill and two decode engines, and a router that chooses by cost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: dict[str, FakeEngine] = {}
        self.router: LiveRouter

    async def start(self) -> Pair:
        for name in ("prefill-0", "decode-0", "decode-1"):
            flags = ("--role", name.partition("-")[0], "--side-channel-port", str(_free_port()))
            self.engines[name] = FakeEngine(self.folder / name, *flags, key=JOB_KEY)
        for name, key in (("api", KEY), ("job", JOB_KEY)):
            (self.folder / f"{name}.key").write_text(key)
        keys = {
            "api_key_file": str(self.folder / "api.key"),
            "job_key_file": str(self.folder / "job.key"),
        }
        self.router = await LiveRouter(self.folder, policy="kv", **keys).start()
        urls = {
            name: await asyncio.to_thread(lambda e=engine: e.url) for name, engine in self.engines.items()
        }
        await self.router.table([worker(name, url) for name, url in urls.items()])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    async def stop(self) -> None:
        await self.router.stop()
        for engine in self.engines.values():
            await asyncio.to_thread(engine.stop)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path)
    yield await pair.start()
    await pair.stop()


async def test_counts_of_client_engines_and_router_agree_and_every_choice_is_explained(pair: Pair) -> None:
    told = []
    async with openai.AsyncOpenAI(base_url=f"{pair.url}/v1", api_key=KEY, max_retries=0) as client:
        for number in range(8):
            messages = [
                {"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What of ship {number}?"},
            ]  # fmt: skip
            stream = await client.chat.completions.create(
                model="toy", messages=messages, max_tokens=6, stream=True,
                stream_options={"include_usage": True}, extra_headers={"x-request-id": f"ship-{number}"},
            )  # fmt: skip
            usages = [part.usage async for part in stream if part.usage is not None]
            told.append(usages[-1])
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(headers=headers) as plain:
        text = (await plain.get(f"{pair.url}/metrics")).text
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
    assert found["hpcserve_router_prompt_tokens_total"] == sum(usage.prompt_tokens for usage in told)
    assert found["hpcserve_router_generation_tokens_total"] == sum(usage.completion_tokens for usage in told)
    assert found["hpcserve_router_time_to_first_token_seconds_count"] == 8
    # All begin with the same long text, so the router expects hits; these engines don't report theirs.
    assert found["hpcserve_router_predicted_cached_tokens_total"] > 0
    assert found["hpcserve_router_cache_reported_prompt_tokens_total"] == 0
    hits = [engine.metric("vllm:prefix_cache_hits_total") for engine in pair.engines.values()]
    assert sum(hits) > 0
    kept = await asyncio.to_thread(decisions, pair.url, pair.folder / "api.key", {"limit": "8"})
    assert [request["request_id"] for request in kept] == [f"ship-{number}" for number in range(7, -1, -1)]
    for request in kept:
        assert request["status"] == 200 and request["decisions"]
        assert all(decision["candidates"] for decision in request["decisions"])
        assert "cost ms" in render(request)
    assert kept[0]["decisions"][-1]["cached_tokens"] > 0 and kept[-1]["decisions"][0]["cached_tokens"] == 0
