"""Real fake engines behind a real router, and clients that read streams."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from hpcserve.http.client import Pool
from tests.fake_engine.running import FakeEngine
from tests.patience import DEADLINE
from tests.router.live import LiveRouter, worker

JOB_KEY = "job-key"
PATIENCE = 60.0
Json = dict[str, Any]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Answer:
    """One stream as a client saw it."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.finish: dict[int, str] = {}
        self.ids: set[str] = set()
        self.roles = 0
        self.tokens = 0
        """Events with text."""
        self.token_ids: list[int] = []
        self.usage: Json | None = None
        self.error: Json | None = None
        self.done = False
        self.status = 0
        self.raw = b""

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    @property
    def whole(self) -> bool:
        return self.done and self.error is None

    def take(self, event: bytes) -> None:
        payload = event.removeprefix(b"data: ")
        if payload == b"[DONE]":
            assert not self.done, "the stream ended twice"
            self.done = True
            return
        chunk = msgspec.json.decode(payload)
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.ids.add(chunk["id"])
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            delta = choice.get("delta", choice)
            self.roles += "role" in delta
            text = delta.get("content") or delta.get("text") or ""
            self.tokens += bool(text)
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + text
            self.token_ids += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                assert index not in self.finish, "an answer ended twice"
                self.finish[index] = choice["finish_reason"]


_BUSY = (
    "vllm:num_requests_running{",
    "vllm:num_requests_waiting{",
    "sglang:num_running_reqs{",
    "sglang:num_queue_reqs{",
)


class Field:
    """`engines` are names such as `decode-1`; `flags` go to all of them."""

    def __init__(self, folder: Path, *engines: str, flags: Iterable[str] = (), **settings: Any) -> None:
        self.folder = folder
        self.meets = settings.get("engine") == "sglang"
        """The engines speak SGLang's dialect."""
        self.names = list(engines)
        self.flags = (*flags, *(("--dialect", "sglang") if self.meets else ()))
        self.engines: dict[str, FakeEngine] = {}
        self.pool = Pool(idle_per_origin=1024)
        self.generation = dict.fromkeys(engines, 0)
        self.stopped: set[str] = set()
        """Engines that can't be told anything."""
        self.ports = {name: free_port() for name in engines}
        self.meetings = {name: free_port() for name in engines if name.startswith("prefill") and self.meets}
        """Where decode engines find prefill engines."""
        for name in engines:
            self.launch(name)
        self.alone = FakeEngine(folder / "alone", *self.flags, "--itl-ms", "0.1", key=JOB_KEY)
        key = folder / "job.key"
        key.write_text(JOB_KEY)
        self.router = LiveRouter(folder, job_key_file=str(key), **settings)

    def launch(self, name: str) -> None:
        """Start an engine; the same port each time."""
        self.stopped.discard(name)
        role = name.partition("-")[0]
        flags: tuple[str, ...] = ("--itl-ms", "30", *self.flags, "--port", str(self.ports[name]))
        if role != "aggregated":
            flags += ("--role", role)
            if name in self.meetings:
                flags += ("--bootstrap-port", str(self.meetings[name]))
            elif not self.meets:
                flags += ("--side-channel-port", str(free_port()))
        self.engines[name] = FakeEngine(self.folder / name, *flags, key=JOB_KEY)

    async def start(self) -> Field:
        await asyncio.to_thread(lambda: [engine.url for engine in (*self.engines.values(), self.alone)])
        await self.router.start()
        await self.announce(*self.names)
        return self

    async def announce(self, *names: str) -> None:
        told = [worker(name, self.engines[name].url, self.generation[name]) for name in names]
        for entry in told:
            if entry["name"] in self.meetings:
                entry["ports"] = {"bootstrap": self.meetings[entry["name"]]}
        await self.router.table(told)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.stopped.add(name)
        self.engines[name].process.send_signal(number)

    async def stream(self, path: str, body: Json, answer: Answer | None = None) -> Answer:
        """Read a stream to its end, or to its break."""
        answer = answer or Answer()
        raw = msgspec.json.encode({"model": "toy", **body, "stream": True})
        headers = [(b"content-type", b"application/json")]
        async with asyncio.timeout(PATIENCE):
            response = await self.pool.request("POST", self.base + path, headers=headers, body=raw)
            answer.status = response.status
            held = b""
            async with response:
                async for piece in response:
                    answer.raw += piece
                    *events, held = (held + piece).split(b"\n\n")
                    if response.status == 200:
                        for event in events:
                            answer.take(event)
        return answer

    async def expected(self, path: str, body: Json) -> Json:
        """The answer of one engine that nothing happens to."""
        raw = msgspec.json.encode({"model": "toy", **body} | {"stream": False, "stream_options": None})
        headers = [(b"authorization", b"Bearer " + JOB_KEY.encode())]
        async with asyncio.timeout(PATIENCE):
            response = await self.pool.request("POST", self.alone.url + path, headers=headers, body=raw)
            answer = msgspec.json.decode(await response.read(1 << 26))
        assert response.status == 200, answer
        return answer  # type: ignore[no-any-return]

    async def during(
        self,
        path: str,
        bodies: list[Json],
        happens: Callable[[], Any],
        *,
        tokens: int = 3,
        hold: int = 12,
    ) -> list[Answer]:
        """All streams at once; `happens` is called when each has had some text.

        However slow the machine is, none has ended by then: its engine holds it at `hold` tokens, or one more
        by turns. They go on when `happens` has returned.
        """
        await self.tell("hold", tokens=hold, spread=1)
        answers = [Answer() for _ in bodies]
        tasks = [
            asyncio.create_task(self.stream(path, body, answer))
            for body, answer in zip(bodies, answers, strict=True)
        ]
        try:
            async with asyncio.timeout(PATIENCE):
                while not all(answer.tokens >= tokens or answer.done for answer in answers):  # noqa: ASYNC110 - a test may poll
                    await asyncio.sleep(0.01)
            result = happens()
            if asyncio.iscoroutine(result):
                await result
            await self.tell("release")
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def tell(self, mode: str, **fields: int) -> None:
        """A command to all engines that can hear."""
        for name in self.names:
            if name not in self.stopped:
                await asyncio.to_thread(self.engines[name].fail, mode, **fields)

    async def metric(self, line: str) -> float:
        """The router's metric that starts with `line`, summed over what follows."""
        response = await self.pool.request("GET", self.base + "/metrics")
        text = (await response.read(1 << 24)).decode()
        return sum(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line))

    async def running(self) -> float:
        """Requests that run or wait on the engines that live."""
        total = 0.0
        for engine in self.engines.values():
            if engine.process.poll() is None:
                text = (await asyncio.to_thread(engine.get, "/metrics")).text
                for row in text.splitlines():
                    if row.startswith(_BUSY):
                        total += float(row.rpartition(" ")[2])
        return total

    async def until_idle(self) -> None:
        """The engines' own count of running requests becomes zero."""
        async with asyncio.timeout(DEADLINE):
            while await self.running():  # noqa: ASYNC110 - engines can only be asked
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self.pool.close()
        await self.router.stop()
        for engine in (*self.engines.values(), self.alone):
            with contextlib.suppress(ProcessLookupError):
                engine.process.send_signal(signal.SIGCONT)
            engine.stop()
