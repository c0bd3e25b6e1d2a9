"""The Batch API of a launched run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import openai

from hpcserve.rundir.atomic import read_json
from tests.patience import DEADLINE

from .jobs import Job, processes
from .runs import events, make_plan, replica, wait_for
from .test_job import aggregated


def api_process(job: Job) -> int | None:
    mark = f"hpcserve.batch api {job.run.batches} "
    return next((pid for pid, line in processes() if mark in line + " "), None)


def client(job: Job) -> openai.OpenAI:
    return openai.OpenAI(base_url=read_json(job.run.endpoint)["url"], api_key="api-secret", timeout=60)


def carried_out(ours: openai.OpenAI, rows: int) -> list[str]:
    """The custom_ids of a batch's output."""
    body = {"model": "model", "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 2}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    text = "".join(json.dumps({"custom_id": f"r{number}", **line}) + "\n" for number in range(rows))
    file = ours.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    batch = ours.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    def over() -> str | None:
        found = ours.batches.retrieve(batch.id)
        assert found.status != "failed", found
        return found.output_file_id if found.status == "completed" else None

    output = ours.files.content(wait_for(over, "the batch's end")).text
    return [json.loads(line)["custom_id"] for line in output.splitlines()]


def test_a_launched_run_has_the_batch_api_also_after_its_process_was_killed(tmp_path: Path) -> None:
    with Job(tmp_path / "run", make_plan(1, replica("aggregated-0", 0), **aggregated())) as job:
        job.wait("ready")
        first = wait_for(lambda: job.run.batch_api.exists() and api_process(job), "the process to listen")
        with client(job) as ours:
            assert carried_out(ours, 5) == [f"r{number}" for number in range(5)]
            os.kill(first, signal.SIGKILL)
            wait_for(
                lambda: api_process(job) not in (None, first) and job.run.batch_api.exists(), "another one"
            )
            assert len(ours.batches.list().data) == 1
            assert carried_out(ours, 3) == ["r0", "r1", "r2"]
        [warning] = [event for event in events(job.run, "warning") if "Batch API" in event["message"]]
        assert "ended with status -9" in warning["message"]
        assert job.run.batches.stat().st_mode & 0o077 == 0
        assert job.stop_by_signal() == 0
        wait_for(lambda: not job.left(), "the end of all processes")
        assert not job.run.batch_api.exists()


def test_the_process_does_not_outlive_the_head(tmp_path: Path) -> None:
    with Job(tmp_path / "run", make_plan(1, replica("aggregated-0", 0), **aggregated())) as job:
        job.wait("ready")
        wait_for(job.run.batch_api.exists, "the process to listen")
        assert api_process(job)
        assert job.head is not None
        job.head.kill()
        job.head.wait(DEADLINE)
        wait_for(lambda: api_process(job) is None, "its end")
