"""The process may be killed at any time."""

from __future__ import annotations

import asyncio

import pytest

from hpcserve.http.exchange import Exchange
from tests.patience import DEADLINE
from tests.router.stubs import Seen, until

from .conftest import Run, content, lines, submit


async def test_killed_in_the_middle_every_row_comes_out_once(run: Run) -> None:
    await run.start("aggregated-0", "aggregated-1")
    kill_at = [60, 150, 220]
    asked = asyncio.Event()

    async def counted(exchange: Exchange, seen: Seen) -> bool:
        await asyncio.sleep(0.01)
        if kill_at and sum(len(stub.seen) for stub in run.bench.stubs.values()) >= kill_at[0]:
            asked.set()
        return False

    for stub in run.bench.stubs.values():
        stub.behave = counted
    client = run.client()
    batches = [await submit(client, lines(120)) for _ in range(3)]
    while kill_at:
        async with asyncio.timeout(DEADLINE):
            await asked.wait()
        run.kill()
        kill_at.pop(0)
        asked.clear()
        await run.start_process()
        assert len([batch async for batch in client.batches.list()]) == 3
    for batch in batches:
        done = await run.over(client, batch.id)
        assert done.status == "completed"
        assert done.request_counts.model_dump() == {"total": 120, "completed": 120, "failed": 0}
        found = await content(client, done.output_file_id)
        assert [line["custom_id"] for line in found] == [f"r{number}" for number in range(120)]


async def test_killed_while_it_cancels_it_cancels(run: Run) -> None:
    await run.start("aggregated-0")
    held = asyncio.Event()

    async def hold(exchange: Exchange, seen: Seen) -> bool:
        if len(run.bench["aggregated-0"].seen) > 5:
            held.set()
            await exchange.closed
            return True
        return False

    run.bench["aggregated-0"].behave = hold
    client = run.client()
    batch = await submit(client, lines(40))
    async with asyncio.timeout(DEADLINE):
        await held.wait()
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    run.kill()
    await run.start_process()
    done = await run.over(client, batch.id)
    assert done.status == "cancelled"
    found = await content(client, done.output_file_id) + await content(client, done.error_file_id)
    assert sorted(line["custom_id"] for line in found) == sorted(f"r{number}" for number in range(40))


async def test_told_to_end_it_ends_at_once_and_its_batches_go_on_later(run: Run) -> None:
    await run.start("aggregated-0")
    held = asyncio.Event()
    go = asyncio.Event()

    async def hold(exchange: Exchange, seen: Seen) -> bool:
        held.set()
        await asyncio.wait((asyncio.ensure_future(go.wait()), exchange.closed), return_when="FIRST_COMPLETED")
        return exchange.gone

    run.bench["aggregated-0"].behave = hold
    client = run.client()
    batch = await submit(client, lines(30))
    async with asyncio.timeout(DEADLINE):
        await held.wait()
    assert run.process is not None
    run.process.terminate()
    await until(lambda: run.process is not None and run.process.poll() == 0, "its end")
    assert not (run.batches / "api.json").exists()
    go.set()
    await run.start_process()
    assert (await run.over(client, batch.id)).status == "completed"


async def test_an_upload_that_broke_off_leaves_nothing(run: Run) -> None:
    await run.start("aggregated-0")
    client = run.client()

    async def parts():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"y" * 200_000
        await until(lambda: list((run.batches / "files").glob("*.jsonl")), "the file to be begun")
        run.kill()
        yield b"z" * 10_000_000

    headers = {"content-type": "multipart/form-data; boundary=x", "authorization": f"Bearer {client.api_key}"}
    answer = await client._client.post(f"{run.bench.url}/v1/files", content=parts(), headers=headers)
    assert answer.status_code == 503
    await run.start_process()
    assert not list((run.batches / "files").iterdir())
    assert not (await client.files.list()).data


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data", "multipart/form-data; boundary=y"]
)
async def test_what_is_no_form_is_refused(run: Run, content_type: str) -> None:
    await run.start("aggregated-0")
    client = run.client()
    headers = {"content-type": content_type, "authorization": f"Bearer {client.api_key}"}
    answer = await client._client.post(f"{run.bench.url}/v1/files", content=b"--x\r\n\r\n", headers=headers)
    assert answer.status_code == 400
