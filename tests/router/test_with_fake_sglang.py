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
from tests.fake_engine.running import wait_until

from . import fleet as fleets
from .fleet import JOB_KEY, NAMES, PROMPT, streamed


class Fleet(fleets.Fleet):
    dialect = "sglang"

    def flags(self, name: str) -> list[str]:
        if not name.startswith("prefill"):
            return []
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.ports[name] = int(sock.getsockname()[1])
        return ["--bootstrap-port", str(self.ports[name])]

    def free(self, *names: str) -> None:
        for name in names:
            for metric in ("sglang:num_running_reqs", "sglang:num_queue_reqs"):
                engine = self.engines[name]
                wait_until(lambda e=engine, m=metric: not e.metric(m), f"{metric} of {name} to be 0")  # type: ignore[misc]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def ours(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(fleet.url) as client:
        yield client


@pytest.fixture
def alone(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with fleet.client(fleet.alone.url) as client:
        yield client


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


def test_decode_killed_mid_stream_goes_on_at_the_other_and_comes_back(
    fleet: Fleet, ours: openai.OpenAI, alone: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "toy", "max_tokens": 400, "temperature": 0, "stream": True}
    streams = [ours.completions.create(prompt=f"{i} {PROMPT}", **asked) for i in range(4)]
    texts = [next(iter(stream)).choices[0].text for stream in streams]
    fleet.engines["decode-0"].stop()
    for i, stream in enumerate(streams):
        texts[i] += "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert texts == [streamed(alone, f"{i} {PROMPT}", max_tokens=400) for i in range(4)]
    fleet.free("prefill-0", "prefill-1", "decode-1")
    fleet.launch("decode-0")
    fleet.announce("prefill-0", "prefill-1", "decode-0")
    assert streamed(ours, PROMPT) == streamed(alone, PROMPT)
    fleet.free("prefill-0", "prefill-1", "decode-0")


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
        return Target(
            name=name, replica=name, url=fleet.engines[name].url, generation=1, ports=ports, machine=name
        )

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
