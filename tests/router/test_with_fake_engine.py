"""The router process before fake engines, 2 prefill and 2 decode, asked by the official client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from hpcserve.http.client import Pool
from tests.fake_engine.running import FakeEngine, wait_until

from .test_process import KEY, Running

JOB_KEY = "job-key"
ENGINES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer"


class Cluster:
    """A router process, four engines, and one engine that does it all for comparison."""

    def __init__(self, tmp_path: Path) -> None:
        key = tmp_path / "job.key"
        key.write_text(JOB_KEY)
        self.engines: dict[str, FakeEngine] = {}
        for name in ENGINES:
            role = name.partition("-")[0]
            flags = ("--role", role, "--side-channel-port", str(_free_port()))
            self.engines[name] = FakeEngine(tmp_path / name, *flags, key=JOB_KEY)
        self.alone = FakeEngine(tmp_path / "alone", key=KEY)
        self.router = Running(tmp_path, job_key_file=str(key))
        self.port = self.router.hear("listening")["port"]
        self.announce(*ENGINES)

    def announce(self, *names: str) -> None:
        workers = [
            {"name": name, "role": name.partition("-")[0], "url": self.engines[name].url, "generation": 0}
            for name in names
        ]
        self.router.tell({"type": "workers", "state": "ready", "workers": workers})
        self.router.hear("stats", workers={name: {"in_flight": 0} for name in names})

    def client(self, base: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=20)

    def stop(self) -> None:
        self.router.stop()
        for engine in (*self.engines.values(), self.alone):
            engine.stop()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop()


@pytest.fixture
def ours(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with cluster.client(f"http://127.0.0.1:{cluster.port}") as client:
        yield client


@pytest.fixture
def alone(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with cluster.client(cluster.alone.url) as client:
        yield client


def test_answers_equal_those_of_one_engine_and_kv_moved(
    cluster: Cluster, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    for i in range(8):
        asked = {"model": "toy", "prompt": f"{i} {PROMPT}", "max_tokens": 12, "temperature": 0}
        texts = {client.completions.create(**asked).choices[0].text for client in (ours, alone)}
        assert len(texts) == 1
    for name in ("decode-0", "decode-1"):
        assert cluster.engines[name].metric("vllm:nixl_bytes_transferred_sum") > 0


def _stream(client: openai.OpenAI, n: int, seed: int) -> tuple[list[str], tuple[int, int, int]]:
    """The texts of a streamed chat by choice, and its usage."""
    texts, usage = [""] * n, None
    for chunk in client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        n=n,
        seed=seed,
        temperature=1.0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert usage is not None
    return texts, (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


def test_choices_of_a_streamed_chat_are_those_of_one_engine(
    ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    texts, usage = _stream(ours, 3, seed=3)
    assert (texts, usage) == _stream(alone, 3, seed=3)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "another one"], [[5, 6, 7, 8], [9, 10, 11]]])
def test_stream_of_several_choices_and_prompts_is_that_of_one_engine(
    ours: openai.OpenAI, alone: openai.OpenAI, prompt: Any
) -> None:
    """Also the usage in every chunk, when the client asks for it."""
    answers = []
    for client in (ours, alone):
        by_choice: dict[int, list[tuple[str, str | None, Any]]] = {}
        for chunk in client.completions.create(
            model="toy",
            prompt=prompt,
            max_tokens=4,
            n=2,
            seed=11,
            temperature=0.9,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        ):
            usage = chunk.usage and (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                by_choice.setdefault(choice.index, []).append((choice.text, choice.finish_reason, usage))
            if not chunk.choices:
                by_choice[-1] = [("", None, usage)]
        answers.append(by_choice)
    assert answers[0] == answers[1]
    assert all(usage for events in answers[0].values() for _, _, usage in events)


def test_whole_choices_are_those_of_one_engine(ours: openai.OpenAI, alone: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "toy", "prompt": ["a b c", "d e"], "max_tokens": 5, "n": 3, "seed": 9}
    answers = [client.completions.create(**asked) for client in (ours, alone)]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage


def test_several_prompts_of_token_ids(ours: openai.OpenAI, alone: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": [[5, 6, 7, 8], [9, 10, 11]], "max_tokens": 5, "temperature": 0}
    answers = [client.completions.create(**asked) for client in (ours, alone)]
    found = [[(c.index, c.text, c.finish_reason) for c in answer.choices] for answer in answers]
    assert found[0] == found[1]
    usages = [(a.usage.prompt_tokens, a.usage.completion_tokens) for a in answers if a.usage]
    assert usages[0] == usages[1]


def test_errors_raise_what_the_client_has_for_them(cluster: Cluster, ours: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ours.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError):
        ours.completions.create(model="toy", prompt="x", max_tokens=10**9)
    with (
        openai.OpenAI(base_url=ours.base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    assert [model.id for model in ours.models.list()] == ["toy"]


def test_client_that_leaves_frees_the_engines(cluster: Cluster, ours: openai.OpenAI) -> None:
    stream = ours.completions.create(model="toy", prompt=PROMPT, max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    for name in ENGINES:
        engine = cluster.engines[name]
        wait_until(lambda engine=engine: not engine.metric("vllm:num_requests_running"), f"{name} to be free")


async def _leave(pool: Pool, url: str, number: int) -> None:
    """Ask for a long answer and go away after 0 to 60 ms, wherever the request is then."""
    body = {"model": "toy", "prompt": f"{number} {PROMPT}", "max_tokens": 2000, "stream": number % 2 == 0}
    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    try:
        async with asyncio.timeout(number % 4 * 0.02):
            response = await pool.request("POST", url, headers=headers, body=msgspec.json.encode(body))
            await response.read(1 << 30)
    except TimeoutError:
        return
    raise AssertionError("the answer came before the client left")


def test_a_thousand_clients_that_leave_free_the_engines(cluster: Cluster) -> None:
    url = f"http://127.0.0.1:{cluster.port}/v1/completions"

    async def ask() -> None:
        pool = Pool()
        for first in range(0, 1000, 50):
            await asyncio.gather(*(_leave(pool, url, first + i) for i in range(50)))
        await pool.close()

    asyncio.run(ask())
    cluster.router.hear("stats", in_flight=0)
    for name in ENGINES:
        for metric in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            engine = cluster.engines[name]
            wait_until(lambda e=engine, m=metric: not e.metric(m), f"no more of {metric} on {name}")
    for name in ("decode-0", "decode-1"):
        engine = cluster.engines[name]
        wait_until(lambda e=engine: not e.metric("vllm:kv_cache_usage_perc"), f"the blocks of {name}")


def test_decode_engine_killed_mid_stream_costs_no_stream_and_is_then_avoided(
    cluster: Cluster, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    """Last in this file: one engine is gone afterwards."""
    victim = cluster.engines["decode-0"]
    asked: dict[str, Any] = {"model": "toy", "max_tokens": 400, "temperature": 0}
    streams = [ours.completions.create(prompt=f"{i} {PROMPT}", stream=True, **asked) for i in range(4)]
    texts = [next(iter(stream)).choices[0].text for stream in streams]
    victim.stop()
    for i, stream in enumerate(streams):
        texts[i] += "".join(chunk.choices[0].text for chunk in stream)
    for i, text in enumerate(texts):
        assert text == alone.completions.create(prompt=f"{i} {PROMPT}", **asked).choices[0].text
    for i in range(4):
        assert ours.completions.create(model="toy", prompt=f"{i} {PROMPT}", max_tokens=3).choices[0].text
