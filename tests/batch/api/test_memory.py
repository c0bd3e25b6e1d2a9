"""Large files pass through router and process in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai

from tests.patience import DEADLINE
from tests.router.live import LiveRouter

from .conftest import Run

SIZE = 256 << 20
ROOM = 64 << 20
PIECE = bytes(range(256)) * 1024


def peak(pid: int) -> int:
    """Bytes that a process had at most: VmHWM of proc(5)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


async def test_a_large_file_goes_up_and_comes_down(run: Run, tmp_path: Path) -> None:
    await run.start("aggregated-0")
    assert run.process is not None
    folder = tmp_path / "router"
    folder.mkdir()
    router = await LiveRouter(folder, batch_api=str(run.batches / "api.json")).start()
    sent, got = hashlib.sha256(), hashlib.sha256()

    async def form() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for _ in range(SIZE // len(PIECE)):
            sent.update(PIECE)
            yield PIECE
        yield b"\r\n--x--\r\n"

    try:
        pids = [*router.pids, run.process.pid]
        before = {pid: peak(pid) for pid in pids}
        url = f"http://127.0.0.1:{router.port}/v1/files"
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            kind = {"content-type": "multipart/form-data; boundary=x"}
            file = (await client.post(url, content=form(), headers=kind)).json()
            assert file["bytes"] == SIZE
            async with client.stream("GET", f"{url}/{file['id']}/content") as answer:
                assert answer.headers["content-length"] == str(SIZE)
                async for piece in answer.aiter_raw():
                    got.update(piece)
        assert sent.digest() == got.digest()
        for pid in pids:
            assert peak(pid) - before[pid] < ROOM
        assert not router.complaints
    finally:
        await router.stop()


async def test_a_run_without_keys_has_the_batch_api_as_well(run: Run, tmp_path: Path) -> None:
    await run.start("aggregated-0")
    folder = tmp_path / "router"
    folder.mkdir()
    router = await LiveRouter(folder, batch_api=str(run.batches / "api.json")).start()
    try:
        url = f"http://127.0.0.1:{router.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            file = await client.files.create(file=("a.jsonl", b"x"), purpose="batch")
            assert [found.id async for found in client.files.list()] == [file.id]
    finally:
        await router.stop()
