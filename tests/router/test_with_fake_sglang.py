"""The router process before fake engines that speak SGLang's dialect, 2 prefill and 2 decode."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from hpcserve import engines
from hpcserve.node.calls import Calls
from hpcserve.node.head.kv_proof import Prover, Target
from tests.fake_engine.running import FakeEngine, wait_until

from .test_process import KEY, Running

JOB_KEY = "job-key"
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer"


class Fleet:
    """A router process, four engines, and one engine that does it all for comparison."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key = folder / "job.key"
        key.write_text(JOB_KEY)
        self.engines: dict[str, FakeEngine] = {}
        self.ports: dict[str, int] = {}
        self.generations = dict.fromkeys(NAMES, 0)
        for name in NAMES:
            self.launch(name)
        self.alone = FakeEngine(folder / "alone", "--dialect", "sglang", key=KEY)
        self.router = Running(folder, job_key_file=str(key), engine="sglang", retries=2)
        self.port = self.router.hear("listening")["port"]
        self.announce(*NAMES)

    def launch(self, name: str) -> None:
        role = name.partition("-")[0]
        flags = ["--dialect", "sglang", "--role", role]
        if role == "prefill":
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self.ports[name] = int(sock.getsockname()[1])
            flags += ["--bootstrap-port", str(self.ports[name])]
        self.generations[name] += 1
        log = self._folder / f"{name}.{self.generations[name]}"
        self.engines[name] = FakeEngine(log, *flags, key=JOB_KEY)

    def announce(self, *names: str) -> None:
        workers = [
            {
                "name": name,
                "role": name.partition("-")[0],
                "url": self.engines[name].url,
                "ports": {"bootstrap": self.ports[name]} if name in self.ports else {},
                "generation": self.generations[name],
            }
            for name in names
        ]
        self.router.tell({"type": "workers", "state": "ready", "workers": workers})
        self.router.hear("stats", workers={name: {"in_flight": 0} for name in names})

    def client(self, base: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=30)

    def free(self, *names: str) -> None:
        for name in names:
            for metric in ("sglang:num_running_reqs", "sglang:num_queue_reqs"):
                engine = self.engines[name]
                wait_until(lambda e=engine, m=metric: not e.metric(m), f"{metric} of {name} to be 0")  # type: ignore[misc]

    def stop(self) -> None:
        self.router.stop()
        for engine in (*self.engines.values(), self.alone):
            engine.stop()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def ours(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(f"http://127.0.0.1:{fleet.port}") as client:
        yield client


@pytest.fixture
def alone(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(fleet.alone.url) as client:
        yield client


def streamed(client: openai.OpenAI, prompt: str, **fields: Any) -> str:
    asked = {"model": "toy", "prompt": prompt, "max_tokens": 40, "temperature": 0, **fields}
    return "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked))


def test_answers_equal_those_of_one_engine_and_kv_moved(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    for i in range(4):
        asked = {"model": "toy", "prompt": f"{i} {PROMPT}", "max_tokens": 12, "temperature": 0}
        assert (
            ours.completions.create(**asked).choices[0].text
            == alone.completions.create(**asked).choices[0].text
        )
        assert streamed(ours, f"{i} {PROMPT}") == streamed(alone, f"{i} {PROMPT}")
    for name in ("prefill-0", "prefill-1"):
        assert fleet.engines[name].metric("sglang:kv_transfer_total_mb_sum") > 0
    fleet.free(*NAMES)


def test_choices_of_a_chat_are_those_of_one_engine(ours: openai.OpenAI, alone: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "toy", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "n": 3, "seed": 3,
    }  # fmt: skip
    answers = [client.chat.completions.create(**asked) for client in (ours, alone)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_client_that_leaves_frees_both_engines(fleet: Fleet, ours: openai.OpenAI) -> None:
    stream = ours.completions.create(model="toy", prompt=PROMPT, max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    fleet.free(*NAMES)


def test_prefill_killed_while_requests_wait_for_it(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    victim = fleet.engines["prefill-0"]
    victim.fail("hang")
    texts: list[str] = []

    async def ask() -> None:
        asking = [asyncio.to_thread(streamed, ours, f"{i} {PROMPT}") for i in range(4)]
        waiting = asyncio.gather(*asking)
        queues = [fleet.engines[name] for name in ("decode-0", "decode-1")]
        waits = "sglang:num_queue_reqs"
        await asyncio.to_thread(wait_until, lambda: any(e.metric(waits) for e in queues), "decode to wait")
        victim.stop()
        texts.extend(await waiting)

    asyncio.run(ask())
    assert texts == [streamed(alone, f"{i} {PROMPT}") for i in range(4)]
    fleet.free("prefill-1", "decode-0", "decode-1")


def test_decode_killed_mid_stream_ends_the_stream_with_an_error_and_others_go_on(
    fleet: Fleet, ours: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "toy", "max_tokens": 2000, "temperature": 0, "stream": True}
    streams = [ours.completions.create(prompt=f"{i} {PROMPT}", **asked) for i in range(2)]
    for stream in streams:
        next(iter(stream))
    fleet.engines["decode-0"].stop()
    broken = 0
    for stream in streams:
        try:
            for _ in stream:
                pass
        except openai.APIError as error:
            broken += 1
            assert "decode-0" in str(error)
    assert broken == 1
    for i in range(4):
        assert streamed(ours, f"{i} {PROMPT}")
    fleet.free("prefill-0", "prefill-1", "decode-1")


def test_a_restarted_prefill_is_met_at_its_new_port(fleet: Fleet, ours: openai.OpenAI) -> None:
    fleet.engines["prefill-0"].stop()
    old = fleet.ports["prefill-0"]
    fleet.launch("prefill-0")
    assert fleet.ports["prefill-0"] != old
    fleet.announce("prefill-0", "decode-0")
    assert streamed(ours, PROMPT)
    assert fleet.engines["prefill-0"].metric("sglang:kv_transfer_total_mb_sum") > 0


def test_without_a_prefill_engine_the_client_hears_so(fleet: Fleet, ours: openai.OpenAI) -> None:
    fleet.announce("decode-0", "decode-1")
    with pytest.raises(openai.APIStatusError) as caught:
        ours.completions.create(model="toy", prompt=PROMPT)
    assert caught.value.status_code == 503 and "no prefill replica is in rotation" in str(caught.value)


def test_the_head_proves_a_pair_by_the_bytes_that_prefill_sent(fleet: Fleet) -> None:
    def target(name: str, **ports: int) -> Target:
        return Target(name=name, url=fleet.engines[name].url, generation=1, ports=ports, machine=name)

    async def prove() -> None:
        calls = Calls(JOB_KEY)
        prover = Prover(engines.get("sglang"), calls, served_name="toy", max_model_len=None)
        good = await prover.pair(target("prefill-0", bootstrap=fleet.ports["prefill-0"]), target("decode-0"))
        assert good.error is None and good.bytes is not None and good.bytes > 0
        # Where decode is sent to the wrong place, no KV passes.
        bad = await prover.pair(target("prefill-0", bootstrap=1), target("decode-0"))
        assert bad.error is not None and "no KV cache passes from prefill-0 to decode-0" in bad.error.message
        await calls.close()

    asyncio.run(prove())
    fleet.free("prefill-0", "decode-0")
