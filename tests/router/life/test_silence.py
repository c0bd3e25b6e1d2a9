"""Workers that neither answer nor hang up: stopped before the first byte, or behind a cut link."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import msgspec
import pytest

from tests.patience import DEADLINE
from tests.router.live import worker
from tests.router.migration.field import Answer, Json


class Link:
    """A TCP link that can be cut: from then on nothing passes, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._whole = asyncio.Event()
        self._whole.set()
        self._server: asyncio.Server
        self.port = 0

    async def start(self) -> Link:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def cut(self) -> None:
        self._whole.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += (writer, ours)
        for source, sink in ((reader, ours), (theirs, writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
        writer.close()

    async def close(self) -> None:
        self._whole.set()
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        closed = (writer.wait_closed() for writer in self._writers)
        await asyncio.gather(*closed, return_exceptions=True)


def bodies(count: int) -> list[Json]:
    return [{"prompt": f"number {i}", "temperature": 0, "max_tokens": 40} for i in range(count)]


async def test_streams_behind_a_cut_link_go_on_elsewhere(field):
    running = await field("aggregated-0", "aggregated-1")
    link = await Link(running.ports["aggregated-1"]).start()
    try:
        await running.router.table(
            [
                worker("aggregated-0", running.engines["aggregated-0"].url),
                worker("aggregated-1", f"http://127.0.0.1:{link.port}"),
            ]
        )
        asked = bodies(12)
        answers = await running.during("/v1/completions", asked, link.cut)
        assert all(answer.whole for answer in answers), answers[0].raw[-300:]
        for answer, body in zip(answers, asked, strict=True):
            assert answer.text == (await running.expected("/v1/completions", body))["choices"][0]["text"]
        assert await running.metric('hpcserve_router_migrations_total{result="resumed"') > 0
    finally:
        await link.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_worker_stopped_before_its_first_byte_is_replaced(field, stream):
    running = await field("aggregated-0", "aggregated-1")
    running.kill("aggregated-1", signal.SIGSTOP)
    asked = bodies(6)

    async def whole(body: Json) -> str:
        raw = msgspec.json.encode({**body, "model": "toy"})
        response = await running.pool.request("POST", running.base + "/v1/completions", body=raw)
        answer = msgspec.json.decode(await response.read(1 << 20))
        return str(answer["choices"][0]["text"])

    async def streamed(body: Json) -> str:
        answer: Answer = await running.stream("/v1/completions", body)
        assert answer.whole
        return answer.text

    async with asyncio.timeout(DEADLINE):
        texts = await asyncio.gather(*((streamed if stream else whole)(body) for body in asked))
    for text, body in zip(texts, asked, strict=True):
        assert text == (await running.expected("/v1/completions", body))["choices"][0]["text"]
    assert running.router.suspects > 0
