"""Real vLLM: one of two engines dies in the middle of eight streams, and no word of them differs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from hpcserve.http.client import Pool
from hpcserve.http.errors import UpstreamError
from tests.models import smollm2
from tests.patience import DEADLINE

from .live import LiveRouter, worker
from .migration.field import Answer, Json, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTIONS = (
    "Write a short story about a fox.",
    "Explain in detail how a compiler works.",
    "Describe the planets of our solar system.",
    "Why is the sky blue? Answer at length.",
    "Give a recipe for bread, step by step.",
    "Write ten lines with emoji about the sea 🌊.",
    "Tell me about the history of Prague.",
    "List twenty animals and say what they eat.",
)
TOKENS = 120
START = 300.0


class Pair:
    """Two engines on one core each, and a router."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.router = LiveRouter(folder, engine="vllm", served_name="smollm2")
        self.pool = Pool()

    def launch(self, model: Path) -> None:
        cores = sorted(os.sched_getaffinity(0))
        for number, port in enumerate(self.ports):
            env = {
                **os.environ,
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)]),
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            argv += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
            argv += [
                "--dtype",
                "float32",
                "--max-model-len",
                "1024",
                "--max-num-seqs",
                "8",
                "--enforce-eager",
            ]
            with (self.folder / f"vllm-{number}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
                )

    async def ready(self) -> None:
        async with asyncio.timeout(START):
            for number, port in enumerate(self.ports):
                while not await self._healthy(port):
                    log = (self.folder / f"vllm-{number}.log").read_text(errors="replace")
                    assert self.processes[number].poll() is None, log[-3000:]
                    await asyncio.sleep(0.5)
        await self.router.start()
        await self.router.table(
            worker(f"aggregated-{number}", f"http://127.0.0.1:{port}")
            for number, port in enumerate(self.ports)
        )

    async def _healthy(self, port: int) -> bool:
        with contextlib.suppress(UpstreamError):
            response = await self.pool.request("GET", f"http://127.0.0.1:{port}/health")
            await response.read(65536)
            return response.status == 200
        return False

    async def ask(self, path: str, body: Json, answer: Answer) -> None:
        raw = msgspec.json.encode({"model": "smollm2", "temperature": 0, "max_tokens": TOKENS, **body})
        headers = [(b"content-type", b"application/json")]
        url = f"http://127.0.0.1:{self.router.port}{path}"
        async with asyncio.timeout(2 * DEADLINE):
            response = await self.pool.request("POST", url, headers=headers, body=raw)
            answer.status = response.status
            held = b""
            async with response:
                async for piece in response:
                    answer.raw += piece
                    *events, held = (held + piece).split(b"\n\n")
                    for event in events if answer.status == 200 else ():
                        answer.take(event)

    async def metrics(self, name: str) -> dict[str, float]:
        """Samples of one of the router's metrics, by their labels."""
        response = await self.pool.request("GET", f"http://127.0.0.1:{self.router.port}/metrics")
        text = (await response.read(1 << 24)).decode()
        samples = (line.rpartition(" ") for line in text.splitlines() if line.startswith(f"{name}{{"))
        return {labels: float(value) for labels, _, value in samples}

    async def in_flight(self, number: int) -> float:
        """Streams on an engine."""
        found = await self.metrics("hpcserve_router_worker_in_flight")
        return sum(value for labels, value in found.items() if f'"aggregated-{number}"' in labels)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[number].pid, signal.SIGKILL)

    async def stop(self) -> None:
        for number in range(len(self.processes)):
            self.kill(number)
        for process in self.processes:
            process.wait(DEADLINE)
        await self.pool.close()
        await self.router.stop()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    both = Pair(tmp_path)
    both.launch(smollm2(tmp_path / "model"))
    try:
        await both.ready()
        yield both
    finally:
        await both.stop()


def _bodies() -> list[tuple[str, Json]]:
    """Chats and completions; some with stop strings, for which vLLM holds text back."""
    asked: list[tuple[str, Json]] = []
    for i, question in enumerate(QUESTIONS):
        body: Json = {"stream": True, "min_tokens": 110, "stream_options": {"include_usage": True}}
        if i % 3 == 2:
            body["stop"] = ["zebra crossing", "the end of it all"]
        if i % 4 == 3:
            asked.append(("/v1/completions", {**body, "prompt": question}))
        else:
            asked.append(
                ("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": question}]})
            )
    return asked


async def test_eight_streams_survive_the_death_of_an_engine_word_for_word(pair: Pair) -> None:
    asked = _bodies()
    unbroken = [Answer() for _ in asked]
    await asyncio.gather(
        *(pair.ask(path, body, answer) for (path, body), answer in zip(asked, unbroken, strict=True))
    )
    assert all(answer.whole for answer in unbroken), [answer.raw[-300:] for answer in unbroken]

    answers = [Answer() for _ in asked]
    tasks = [
        asyncio.create_task(pair.ask(path, body, answer))
        for (path, body), answer in zip(asked, answers, strict=True)
    ]
    async with asyncio.timeout(2 * DEADLINE):
        while not all(answer.tokens >= 8 for answer in answers):  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.05)
    # On a busy machine one engine may be through before the other has well begun.
    running = [await pair.in_flight(number) for number in range(2)]
    assert max(running) >= 2, running
    pair.kill(running.index(max(running)))
    await asyncio.gather(*tasks)

    assert all(answer.whole for answer in answers), [answer.raw[-600:] for answer in answers]
    assert [answer.text for answer in answers] == [answer.text for answer in unbroken]
    assert [answer.finish for answer in answers] == [answer.finish for answer in unbroken]
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    for answer, should in zip(answers, unbroken, strict=True):
        assert answer.usage is not None and should.usage is not None
        assert [answer.usage[key] for key in counted] == [should.usage[key] for key in counted]
        assert len(answer.ids) == 1
    moved = await pair.metrics("hpcserve_router_migrations_total")
    assert sum(value for labels, value in moved.items() if 'result="resumed"' in labels) >= 2
