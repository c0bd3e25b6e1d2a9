"""The router before one server with several data-parallel ranks."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from hpcserve import engines
from hpcserve.engines.kv_events.endpoints import config, in_directory
from hpcserve.router.breaker import Breaker
from hpcserve.router.config import WorkerSpec
from hpcserve.router.placement.facts import EngineFacts
from hpcserve.router.stall import StallWatch
from hpcserve.router.workers import WorkerTable
from tests.fake_engine.running import FakeEngine, wait_until

from .test_process import KEY, Running
from .test_with_fake_engine import JOB_KEY

RANKS = ("aggregated-0#0", "aggregated-0#1")
PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer " * 4


class Endpoint:
    def __init__(self, path: Path) -> None:
        (path / "job.key").write_text(JOB_KEY)
        events = msgspec.json.encode(config(str(path))).decode()
        flags = ("--data-parallel-size", "2", "--kv-events-config", events)
        self.engine = FakeEngine(path / "engine", *flags, key=JOB_KEY)
        places = {
            name: [(place.events, place.replay)]
            for name, place in zip(RANKS, in_directory(str(path), range(2)), strict=True)
        }
        self.router = Running(path, job_key_file=str(path / "job.key"), policy="kv", kv_events=places)
        self.url = f"http://127.0.0.1:{self.router.hear('listening')['port']}"
        workers = [
            {
                "name": name, "role": "aggregated", "url": self.engine.url, "generation": 1,
                "replica": "aggregated-0", "rank": rank, "headers": {"x-data-parallel-rank": str(rank)},
            }
            for rank, name in enumerate(RANKS)
        ]  # fmt: skip
        self.router.tell({"type": "workers", "state": "ready", "workers": workers})
        self.router.hear("stats", workers={name: {"in_flight": 0} for name in RANKS})
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def ask(self, prompt: str, **more: object) -> str:
        """The rank that the router chose."""
        answer = self.client.completions.with_raw_response.create(
            model="toy",
            prompt=prompt,
            max_tokens=4,
            **more,  # type: ignore[arg-type]
        )
        query = {"request_id": answer.headers["x-request-id"]}
        found = self.client.get("/hpcserve/decisions", cast_to=dict, options={"params": query})
        name: str = found["data"][0]["decisions"][-1]["worker"]
        return name

    def answered(self) -> dict[str, float]:
        """What each rank says itself."""
        text = self.engine.get("/metrics").text
        return {name: EngineFacts.parse(text, rank).computed_tokens for rank, name in enumerate(RANKS)}

    def followed(self) -> float:
        """Ranks whose KV events the router follows."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read().decode()
        (value,) = re.findall(r'^hpcserve_router_kv_index_entries{what="live_sources"} (\S+)$', text, re.M)
        return float(value)

    def close(self) -> None:
        self.client.close()
        self.router.stop()
        self.engine.stop()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    running = Endpoint(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()


def test_the_rank_that_is_chosen_is_the_one_that_computes(endpoint: Endpoint) -> None:
    before = endpoint.answered()
    with ThreadPoolExecutor(8) as pool:
        chosen = Counter(pool.map(endpoint.ask, (f"{number} {PROMPT}" for number in range(8))))
    after = endpoint.answered()
    assert set(chosen) == set(RANKS)
    tokens = sum(after[name] - before[name] for name in RANKS) / 8
    assert {name: after[name] - before[name] for name in RANKS} == {
        name: count * tokens for name, count in chosen.items()
    }


def test_what_a_rank_holds_is_known_of_that_rank_alone(endpoint: Endpoint) -> None:
    wait_until(lambda: endpoint.followed() == len(RANKS), "the KV events of both ranks to be followed")
    chosen = endpoint.ask(f"again {PROMPT}")
    for _ in range(4):
        assert endpoint.ask(f"again {PROMPT}") == chosen


def test_a_client_can_not_choose(endpoint: Endpoint) -> None:
    other = {"x-data-parallel-rank": "7"}
    assert endpoint.ask(f"mine {PROMPT}", extra_headers=other) in RANKS


def test_ranks_of_one_replica_are_doubted_together() -> None:
    def spec(name: str, replica: str | None = None, generation: int = 1) -> WorkerSpec:
        return WorkerSpec(
            name=name, role="aggregated", url="http://a", replica=replica, generation=generation
        )

    table = WorkerTable([spec("a#0", "a"), spec("a#1", "a"), spec("b", "b"), spec("c")])
    breakers: dict[str, Breaker] = {worker.name: worker.breaker for worker in table.all()}
    assert breakers["a#0"] is breakers["a#1"]
    assert len({id(breaker) for breaker in breakers.values()}) == 3
    table.update([spec("a#0", "a", 2), spec("a#1", "a", 2)])
    first, second = table.all()
    assert first.breaker is second.breaker is not breakers["a#0"]


def test_a_silent_replica_is_not_left_for_its_own_other_rank() -> None:
    ours = [WorkerSpec(name=f"a#{rank}", role="aggregated", url="http://a", replica="a") for rank in range(2)]
    other = WorkerSpec(name="b", role="aggregated", url="http://b", replica="b")
    table = WorkerTable(ours)
    pool: Any = None
    watch = StallWatch(table, pool, engines.get("vllm"), None, lambda worker, reason: None)
    assert [watch._others(worker) for worker in table.all()] == [False, False]
    table.update([*ours, other])
    assert all(watch._others(worker) for worker in table.all())
