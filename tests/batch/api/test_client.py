"""The official client, unmodified, through the router."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest

from hpcserve.http.exchange import Exchange
from hpcserve.router.admission.admission import Ticket
from hpcserve.router.keys.identity import BATCH
from tests.router.stubs import Seen, answer_with, until

from .conftest import Run, content, lines, submit


async def test_a_batch_from_its_file_to_its_output(run: Run) -> None:
    await run.start("aggregated-0", "aggregated-1")
    client = run.client()
    data = lines(50)
    before = int(time.time())
    file = await client.files.create(file=("questions.jsonl", data), purpose="batch")
    assert (file.object, file.purpose, file.filename) == ("file", "batch", "questions.jsonl")
    assert file.bytes == len(data)
    assert (await client.files.content(file.id)).content == data
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    assert (batch.object, batch.status, batch.completion_window) == ("batch", "validating", "24h")
    done = await run.over(client, batch.id)
    assert done.status == "completed", run.log
    assert done.metadata == {"a": "b"}
    assert done.model == "toy"
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 50, "completed": 50, "failed": 0}
    assert done.error_file_id is None
    assert done.errors is None
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert times == sorted(times)
    assert times[0] >= before
    found = await content(client, done.output_file_id)
    assert [line["custom_id"] for line in found] == [f"r{number}" for number in range(50)]
    assert {line["response"]["status_code"] for line in found} == {200}
    assert found[7]["response"]["body"]["choices"][0]["message"]["content"] == "row/- 7/- "
    about = await client.files.retrieve(str(done.output_file_id))
    assert about.purpose == "batch_output"
    assert about.bytes == len((await client.files.content(about.id)).content)


async def test_rows_that_fail_are_in_the_error_file(run: Run) -> None:
    await run.start("aggregated-0")
    refuse = answer_with(400, "not this one")

    async def picky(exchange: Exchange, seen: Seen) -> bool:
        if seen.body is not None and "row 3 " in str(seen.body):
            return await refuse(exchange, seen)
        return False

    run.bench["aggregated-0"].behave = picky
    client = run.client()
    done = await run.over(client, (await submit(client, lines(10))).id)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 10, "completed": 9, "failed": 1}
    [failed] = await content(client, done.error_file_id)
    assert failed["custom_id"] == "r3"
    assert "not this one" in failed["error"]["message"]
    assert len(await content(client, done.output_file_id)) == 9


async def test_a_batch_of_errors_alone_is_completed_without_an_output(run: Run) -> None:
    await run.start("aggregated-0")
    run.bench["aggregated-0"].behave = answer_with(400, "no")
    client = run.client()
    done = await run.over(client, (await submit(client, lines(60))).id)
    assert (done.status, done.output_file_id) == ("completed", None)
    assert done.request_counts.failed == 60
    assert len(await content(client, done.error_file_id)) == 60


@pytest.mark.parametrize(
    ("bad", "code", "told"),
    [
        (b'{"custom_id": "x"\n', "invalid_json_line", "broken JSON"),
        (lines(1), "duplicate_custom_id", "custom_id 'r0'"),
        (lines(1, url="/v1/completions").replace(b"r0", b"x"), "mismatched_endpoint", "/v1/completions"),
        (lines(1, stream=True).replace(b"r0", b"x"), "invalid_request", "stream"),
        (lines(1).replace(b"r0", b"x").replace(b"POST", b"GET"), "invalid_method", "method"),
    ],
)
async def test_a_bad_line_fails_the_batch_with_its_number(run: Run, bad: bytes, code: str, told: str) -> None:
    await run.start("aggregated-0")
    client = run.client()
    done = await run.over(client, (await submit(client, lines(4) + bad)).id)
    assert done.status == "failed"
    assert done.failed_at
    [error] = done.errors.data
    assert (error.code, error.line) == (code, 5)
    assert told in error.message
    assert str(run.folder) not in error.message
    assert not run.bench["aggregated-0"].seen


async def test_plain_rows_are_no_batch(run: Run) -> None:
    await run.start("aggregated-0")
    client = run.client()
    done = await run.over(client, (await submit(client, b'{"prompt": "hi"}\n')).id)
    assert done.status == "failed"
    assert "custom_id, method, url and body" in done.errors.data[0].message
    assert done.errors.data[0].line == 1


async def test_a_vllm_run_batch_file_runs_unchanged(run: Run) -> None:
    """As in vLLM's examples/offline_inference/openai_batch/README.md."""
    await run.start("aggregated-0")
    data = b"".join(
        b'{"custom_id": "request-%d", "method": "POST", "url": "/v1/chat/completions",'
        b' "body": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "messages":'
        b' [{"role": "system", "content": "You are %b assistant."},{"role": "user",'
        b' "content": "Hello world!"}],"max_completion_tokens": 1000}}\n' % line
        for line in ((1, b"a helpful"), (2, b"an unhelpful"))
    )
    client = run.client()
    done = await run.over(client, (await submit(client, data)).id)
    assert done.status == "completed"
    found = await content(client, done.output_file_id)
    assert [line["custom_id"] for line in found] == ["request-1", "request-2"]
    assert {seen.body["model"] for seen in run.bench["aggregated-0"].seen} == {"toy"}


async def test_lists_come_in_pages(run: Run) -> None:
    await run.start("aggregated-0")
    client = run.client()
    made = [(await submit(client, lines(1))).id for _ in range(5)]
    first = await client.batches.list(limit=2)
    assert [batch.id for batch in first.data] == made[:2:-1]
    assert first.has_more
    assert [batch.id async for batch in client.batches.list(limit=2)] == made[::-1]
    files = [file.id async for file in client.files.list(purpose="batch", order="asc", limit=2)]
    assert len(files) == 5
    for name in made:
        await run.over(client, name)
    assert len([file async for file in client.files.list(purpose="batch_output")]) == 5
    with pytest.raises(openai.NotFoundError, match="after"):
        await client.batches.list(after="batch_nobody")
    with pytest.raises(openai.BadRequestError, match="limit"):
        await client.batches.list(limit=1000)


async def test_a_cancelled_batch_gives_what_was_answered(run: Run) -> None:
    await run.start("aggregated-0")
    go = asyncio.Event()

    async def slow(exchange: Exchange, seen: Seen) -> bool:
        if len(run.bench["aggregated-0"].seen) > 10:
            await go.wait()
        return False

    run.bench["aggregated-0"].behave = slow
    client = run.client()
    batch = await submit(client, lines(100))
    await until(lambda: len(run.bench["aggregated-0"].seen) > 10, "rows to be in flight")
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        await client.files.delete(batch.input_file_id)
    told = await client.batches.cancel(batch.id)
    assert told.status == "cancelling"
    assert told.cancelling_at
    go.set()
    done = await run.over(client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelled_at
    answered = {line["custom_id"] for line in await content(client, done.output_file_id)}
    rest = await content(client, done.error_file_id)
    assert 10 <= len(answered) < 100
    assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}
    assert sorted([*answered, *(line["custom_id"] for line in rest)]) == sorted(f"r{n}" for n in range(100))
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        await client.batches.cancel(batch.id)
    assert (await client.files.delete(batch.input_file_id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(batch.input_file_id)


async def test_a_batch_that_waits_for_others_is_cancelled_at_once(run: Run) -> None:
    await run.start("aggregated-0", options=("--at-once", "1"))
    go = asyncio.Event()

    async def slow(exchange: Exchange, seen: Seen) -> bool:
        await go.wait()
        return False

    run.bench["aggregated-0"].behave = slow
    client = run.client()
    first, second = await submit(client, lines(3)), await submit(client, lines(3))
    await until(lambda: run.bench["aggregated-0"].seen, "the first to be driven")
    await client.batches.cancel(second.id)
    assert (await run.over(client, second.id)).status == "cancelled"
    assert (await client.batches.retrieve(first.id)).status == "in_progress"
    go.set()
    assert (await run.over(client, first.id)).status == "completed"


async def test_the_walltimes_end_expires_a_batch_with_what_it_has(run: Run) -> None:
    end = time.time() + 10
    await run.start("aggregated-0", end_time=end)
    client = run.client()
    batch = await submit(client, lines(20))
    assert batch.expires_at == int(end)
    done = await run.over(client, batch.id)
    assert done.status == "expired"
    assert "walltime" in done.errors.data[0].message
    rest = await content(client, done.error_file_id)
    assert {line["error"]["code"] for line in rest} == {"batch_expired"}
    assert len(rest) == 20


async def test_what_is_not_a_batch_is_refused_with_its_reason(run: Run) -> None:
    await run.start("aggregated-0", options=("--max-file", "1000"))
    client = run.client()
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.files.create(file=("a.jsonl", b"x"), purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="larger than 1000 bytes") as large:
        await client.files.create(file=("a.jsonl", b"x" * 5_000_000), purpose="batch")
    assert large.value.status_code == 413
    assert not list((run.batches / "files").iterdir()), "nothing is left of refused files"
    file = await client.files.create(file=("a.jsonl", lines(1)), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for change, told in [
        ({"completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ]:
        with pytest.raises(openai.BadRequestError, match=told):
            await client.batches.create(**{**asked, **change})
    with pytest.raises(openai.NotFoundError, match="file-nobody"):
        await client.batches.create(**{**asked, "input_file_id": "file-nobody"})
    with pytest.raises(openai.AuthenticationError):
        await run.client("wrong").files.list()


async def test_rows_are_of_batch_priority_and_count_for_who_made_the_batch(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = run.keys.create("ada", created_by="test")
    await run.start("aggregated-0")
    admission = run.bench.router.admission
    classes, admit = [], admission.admit

    def watched(*args: Any, **named: Any) -> Ticket:
        ticket = admit(*args, **named)
        classes.append(ticket.priority)
        return ticket

    monkeypatch.setattr(admission, "admit", watched)
    client = run.client(key)
    done = await run.over(client, (await submit(client, lines(5))).id)
    assert classes == [BATCH] * 5
    assert done.status == "completed"
    assert run.bench.metric('hpcserve_router_key_requests_total{key="ada"}') == 5
    for seen in run.bench["aggregated-0"].seen:
        assert seen.header(b"x-hpcserve-on-behalf") is None


async def test_others_files_and_batches_are_not_there(run: Run) -> None:
    _, adas = run.keys.create("ada", created_by="test")
    _, bobs = run.keys.create("bob", created_by="test")
    await run.start("aggregated-0")
    ada, bob, owner = run.client(adas), run.client(bobs), run.client()
    batch = await submit(ada, lines(3))
    done = await run.over(ada, batch.id)
    output = str(done.output_file_id)
    # A client can't say who it is.
    forged = bob.with_options(default_headers={"x-hpcserve-user": "ada", "x-hpcserve-on-behalf": "ada"})
    for other in (bob, forged):
        for asked in (
            lambda other=other: other.batches.retrieve(batch.id),
            lambda other=other: other.batches.cancel(batch.id),
            lambda other=other: other.files.retrieve(output),
            lambda other=other: other.files.content(output),
            lambda other=other: other.files.delete(batch.input_file_id),
            lambda other=other: submit_of(other, batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await asked()
        assert not (await other.batches.list()).data
        assert not (await other.files.list()).data
    assert len(await content(ada, output)) == 3
    assert (await owner.batches.retrieve(batch.id)).status == "completed"
    assert [found.id async for found in owner.batches.list()] == [batch.id]


async def submit_of(client: openai.AsyncOpenAI, file: str) -> object:
    return await client.batches.create(
        input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
    )


async def test_a_key_that_may_not_use_the_model_makes_no_batch(run: Run) -> None:
    _, key = run.keys.create("ada", created_by="test", models=("other",))
    await run.start("aggregated-0")
    with pytest.raises(openai.PermissionDeniedError):
        await submit(run.client(key), lines(1))


async def test_a_revoked_key_ends_its_batch_with_what_was_answered(run: Run) -> None:
    record, key = run.keys.create("ada", created_by="test")
    await run.start("aggregated-0")

    async def revoked(exchange: Exchange, seen: Seen) -> bool:
        if len(run.bench["aggregated-0"].seen) == 5:
            run.keys.revoke(record.id)
            run.bench.router.keyring.reload()
        return False

    run.bench["aggregated-0"].behave = revoked
    batch = await submit(run.client(key), lines(200))
    done = await run.over(run.client(), batch.id)
    assert done.status == "failed"
    assert done.errors.data[0].code == "refused"
    found = await content(run.client(), done.output_file_id) + await content(run.client(), done.error_file_id)
    assert sorted(line["custom_id"] for line in found) == sorted(f"r{number}" for number in range(200))


async def test_without_the_process_it_says_so(run: Run) -> None:
    await run.start("aggregated-0")
    run.kill()
    with pytest.raises(openai.InternalServerError, match=r"logs/batches\.log") as told:
        await run.client().batches.list()
    assert told.value.status_code == 503
    assert told.value.code == "no_batch_api"


async def test_only_the_router_is_listened_to(run: Run) -> None:
    await run.start("aggregated-0")
    address = json.loads((run.batches / "api.json").read_text())
    assert (run.batches / "api.json").stat().st_mode & 0o077 == 0
    async with openai.AsyncOpenAI(base_url=f"{address['url']}/v1", api_key="guess", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.batches.list()
