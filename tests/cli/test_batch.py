"""`hpcserve batch` on this machine: real jobs and a real endpoint, fake engines, whatever is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcserve.batch import history
from hpcserve.batch.__main__ import check
from hpcserve.batch.begin import BatchRequest, Model, begin
from hpcserve.batch.journal import Entry, JournalWriter, Kind
from hpcserve.batch.layout import BatchDir
from hpcserve.batch.progress import Progress
from hpcserve.errors import MORE_TO_DO, ConfigError, JobError, TooManyErrors
from hpcserve.slurm.local import job_processes
from tests.patience import DEADLINE

from .conftest import Answer, World
from .test_batch_bad_inputs import everything
from .test_local_launch import nothing_left

pytestmark = pytest.mark.timeout(300)

# Without mpirun, which would take half of each run's time.
SITE = "extends: local\nslurm: {mpi: none}\n"
FAST = "model: org/tiny\nengine: fake\naggregated: {}\n"
SLOW = FAST + "engine_args: {itl-ms: 50, max-num-seqs: 4}\n"
COUNT = 120
ROWS = [{"q": f"question {number}", "n": number, "more": {"a": [number]}} for number in range(COUNT)]
TEMPLATE = "Tell me about {{ q }}\n"
RESULTS = ["response", "reasoning", "finish_reason", "usage", "attempts", "error"]
PLAIN = ("model.yaml", "data.jsonl", "-o", "out", "--template", "t.j2", "--sampling", "max_tokens=6")


def written(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.02)


@pytest.fixture
def user(world: World) -> Iterator[World]:
    """Somebody with a dataset and a model.yaml, on this machine."""
    world.site("here", SITE)
    world.monkeypatch.setenv("HPCSERVE_SITE", "here")
    world.model.write_text(FAST)
    written(world.home / "data.jsonl", ROWS)
    (world.home / "t.j2").write_text(TEMPLATE)
    yield world
    for run in world.runs.glob("*"):
        world("stop", run.name, "--wait", "0")
        world("stop", run.name, "--wait", "20")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run that serves, launched by somebody else's command."""
    home = tmp_path_factory.mktemp("serving")
    (home / "here.yaml").write_text(SITE)
    (home / "model.yaml").write_text(FAST + "engine_args: {itl-ms: 2}\n")
    ours = ("HPCSERVE_", "SBATCH_", "SLURM_", "XDG_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environ |= {"HOME": str(home), "HPCSERVE_SITE": str(home / "here.yaml")}

    def hpcserve(*words: str) -> None:
        command = [sys.executable, "-m", "hpcserve", *words]
        subprocess.run(command, cwd=home, env=environ, check=True, capture_output=True, timeout=DEADLINE)

    hpcserve("launch", "--name", "shared", "model.yaml")
    path = home / ".hpcserve/runs/shared"
    yield path
    hpcserve("stop", "shared", "--wait", "0")
    hpcserve("stop", "shared", "--wait", "30")
    assert nothing_left(path)


def results(world: World) -> int:
    """Lines of the journals, so far."""
    return sum(path.read_bytes().count(b"\n") for path in world.home.glob("out/.batch/journals/*.data"))


def state_of(world: World, name: str) -> str:
    return str(json.loads(world("status", name, "--json").out)["state"])


def assert_complete(world: World, answer: Answer) -> None:
    """Every row is there once, in order, with all its columns."""
    assert answer.status == 0, answer.err
    rows = read(world.home / "out/output.jsonl")
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS
    assert all([*row] == [*ROWS[0], *RESULTS] for row in rows)
    assert all(row["response"] and row["error"] is None for row in rows)


# With jobs of its own


def test_rows_come_out_in_order_with_their_columns_and_once_is_enough(user: World) -> None:
    answer = user("batch", *PLAIN, "--name", "one")
    assert_complete(user, answer)
    assert answer.out == f"{user.home / 'out/output.jsonl'}\n"
    assert f"planned {COUNT} rows" in answer.err
    report = json.loads((user.home / "out/report.json").read_text())
    assert (report["rows"], report["errors"], report["computed_more_than_once"]) == (COUNT, 0, 0)
    assert nothing_left(user.runs / "one")

    before = everything(user.home)
    again = user("batch", *PLAIN, "--json")
    assert again.status == 0
    assert f"out is complete: {COUNT} rows" in again.err
    told = json.loads(again.out)
    assert (told["state"], told["report"]["rows"]) == ("complete", COUNT)
    assert told["output"] == str(user.home / "out/output.jsonl")
    assert everything(user.home) == before


def kill_driver(world: World) -> None:
    events = read(world.runs / "one/events.jsonl")
    [pid] = [event["pid"] for event in events if event["event"] == "batch-started"]
    os.kill(pid, signal.SIGKILL)


def kill_job(world: World) -> None:
    """All of its processes, as a node does that loses its power."""
    job = json.loads((world.runs / "one/run.json").read_text())["job_id"]
    leader, started = int(job.split("-")[1]), int(job.split("-")[2])
    for pid in job_processes(leader, started):
        os.kill(pid, signal.SIGKILL)


def stop(world: World) -> None:
    assert world("stop", "one", "--wait", "60").status == 0


@pytest.mark.parametrize(
    ("end", "state"),
    [(kill_driver, "failed"), (kill_job, "ended"), (stop, "stopped")],
    ids=["driver", "job", "stop"],
)
def test_whatever_is_ended_in_the_middle_the_same_command_goes_on(
    user: World, end: Callable[[World], None], state: str
) -> None:
    user.model.write_text(SLOW)
    begun = user("batch", *PLAIN, "--name", "one", "--no-wait", "--json")
    assert begun.status == 0, begun.err
    assert json.loads(begun.out)["state"] == "submitted"
    assert json.loads(begun.out)["runs"] == ["one"]
    wait_for(lambda: results(user) >= 5 and (user.home / "out/.batch/status.json").exists())
    shown = user("status", "one")
    assert f"/{COUNT} rows" in next(line for line in shown.out.splitlines() if line.startswith("batch: "))
    assert json.loads(user("status", "one", "--json").out)["batch"]["items"] == COUNT
    end(user)
    assert nothing_left(user.runs / "one")
    done = results(user)
    assert 5 <= done < COUNT
    assert state_of(user, "one") == state
    assert not (user.home / "out/output.jsonl").exists()

    user.model.write_text(FAST)
    answer = user("batch", *PLAIN, "--name", "two")
    assert_complete(user, answer)
    assert f"goes on with {COUNT} rows" in answer.err
    report = json.loads((user.home / "out/report.json").read_text())
    # What was answered is not asked again, but for what was in flight.
    assert report["computed_more_than_once"] < done
    assert not list(user.home.glob("out/.batch/journals"))


def test_a_batch_that_is_stopped_while_somebody_watches_has_more_to_do(user: World) -> None:
    user.model.write_text(SLOW)

    def stop_it() -> None:
        wait_for(lambda: results(user) >= 5)
        # What `hpcserve stop` writes: its own output would be the watching one's.
        (user.home / "out/.batch/stop").touch()

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    answer = user("batch", *PLAIN, "--name", "one", "--json")
    stopper.join()
    assert answer.status == MORE_TO_DO, answer.err
    assert "there is more to do: give the same command again" in answer.err
    assert json.loads(answer.out)["state"] == "unfinished"


def test_a_job_whose_rows_all_fail_ends_with_the_first_errors_and_status_9(user: World) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": -1}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    written(user.home / "data.jsonl", [{"custom_id": f"r{number}", **line} for number in range(40)])
    answer = user("batch", "model.yaml", "data.jsonl", "-o", "out", "--name", "one")
    message, _, hint = answer.err.rpartition("error: ")[2].partition("\n\nhint: ")
    assert answer.status == 9, answer.err
    assert "rows failed, more than --max-error-rate allows (50%)" in message
    assert "max_tokens" in message
    assert "--max-error-rate" in hint
    assert answer.out == ""
    assert nothing_left(user.runs / "one")
    assert state_of(user, "one") == "failed"
    assert not (user.home / "out/output.jsonl").exists()


def test_rows_that_failed_when_too_many_did_are_sent_again(user: World) -> None:
    written(user.home / "data.jsonl", [{"question": f"why {'x ' * 30}{number}"} for number in range(40)])
    ask = (
        "batch",
        "model.yaml",
        "data.jsonl",
        "-o",
        "out",
        "--prompt-column",
        "question",
        "--format",
        "openai",
    )
    answer = user(*ask, "--name", "one", "--set", "max_model_len=16")
    assert answer.status == 9, answer.err
    # A job that waited behind it would load its model for the same end.
    with pytest.raises(TooManyErrors, match="rows failed"):
        check(BatchDir(user.home / "out"))
    answer = user(*ask, "--name", "two")
    assert answer.status == 0, answer.err
    assert re.search(r"\d+ of them failed when too many did, and are sent again", answer.err)
    lines = [json.loads(line) for line in (user.home / "out/output.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [None] * 40
    assert (user.home / "out/errors.jsonl").read_text() == ""


# On a run that serves


def test_openai_lines_become_openai_files_in_their_order(user: World, run: Path) -> None:
    def line(number: int) -> dict[str, Any]:
        wrong = {"max_tokens": -1} if number == 7 else {"max_tokens": 4}
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": f"hello {number}"}], **wrong}
        return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}

    written(user.home / "data.jsonl", [line(number) for number in range(40)])
    answer = user("batch", "data.jsonl", "-o", "out", "--endpoint", str(run))
    assert answer.status == 0, answer.err
    answers, [error] = read(user.home / "out/output.jsonl"), read(user.home / "out/errors.jsonl")
    assert [one["custom_id"] for one in answers] == [f"r{number}" for number in range(40) if number != 7]
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 4 for one in answers)
    assert (error["custom_id"], error["response"]["status_code"]) == ("r7", 400)

    table = user("batch", "convert", "out", "table.parquet")
    assert (table.status, table.out) == (0, "table.parquet\n"), table.err
    assert "40 rows" in table.err
    told = user("batch", "convert", "table.parquet", "table.jsonl", "--json")
    assert json.loads(told.out)["rows"] == 40
    rows = read(user.home / "table.jsonl")
    assert [row["custom_id"] for row in rows] == [f"r{number}" for number in range(40)]
    assert [bool(row["error"]) for row in rows] == [number == 7 for number in range(40)]


def test_a_batch_that_is_complete_needs_its_endpoint_no_more(user: World, run: Path) -> None:
    gone = user.home / "gone"
    shutil.copytree(run, gone)
    words = ("batch", *PLAIN[1:], "--endpoint")
    assert user(*words, str(run)).status == 0
    (gone / "endpoint.json").unlink()
    assert_complete(user, user(*words, str(gone)))
    assert user("batch", "data.jsonl", "-o", "other", *PLAIN[4:], "--endpoint", str(gone)).status == 8
    assert not (user.home / "other").exists()


def test_order_of_completion_has_the_same_lines_in_another_order(user: World, run: Path) -> None:
    words = (*PLAIN[1:2], *PLAIN[4:], "--endpoint", str(run), "--format", "openai")
    for order in ("input", "completion"):
        answer = user("batch", *words, "-o", order, "--order", order)
        assert answer.status == 0, answer.err
    by_input, by_completion = (read(user.home / order / "output.jsonl") for order in ("input", "completion"))
    assert [one["custom_id"] for one in by_input] == [f"row-{number}" for number in range(COUNT)]
    assert {one["custom_id"] for one in by_completion} == {one["custom_id"] for one in by_input}
    assert len(by_completion) == COUNT


def test_parquet_becomes_parquet_with_its_types(user: World, run: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("q", pa.large_string()), ("n", pa.int16()), ("day", pa.date32())])
    columns = {"q": [row["q"] for row in ROWS], "n": range(COUNT), "day": [None] * COUNT}
    table = pa.table({name: list(values) for name, values in columns.items()}, schema=schema)
    pq.write_table(table, user.home / "data.parquet")
    answer = user("batch", "data.parquet", *PLAIN[2:], "--endpoint", str(run))
    assert answer.status == 0, answer.err
    found = pq.read_table(user.home / "out/output.parquet")
    assert found.select(schema.names).equals(table)
    assert found.schema.names == [*schema.names, *RESULTS]
    assert found["error"].null_count == COUNT


def test_samples_differ_and_each_row_has_all_of_its_own(user: World, run: Path) -> None:
    answer = user("batch", *PLAIN[1:], "--endpoint", str(run), "--samples", "3", "--limit", "10")
    assert answer.status == 0, answer.err
    rows = read(user.home / "out/output.jsonl")
    assert [(row["n"], row["sample"]) for row in rows] == [(n, s) for n in range(10) for s in range(3)]
    assert len({row["response"] for row in rows if row["n"] == 0}) == 3


def test_a_part_of_the_rows_is_the_first_or_a_random_one(user: World, run: Path) -> None:
    for part in (("--limit", "9"), ("--sample", "9")):
        out = part[0].strip("-")
        words = (PLAIN[1], *PLAIN[4:], "-o", out, "--endpoint", str(run), *part)
        assert user("batch", *words).status == 0
    first, chosen = (
        [row["n"] for row in read(user.home / out / "output.jsonl")] for out in ("limit", "sample")
    )
    assert first == list(range(9))
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == 9
    assert chosen != first


def test_people_at_the_same_endpoint_are_answered_meanwhile(user: World, run: Path) -> None:
    url = json.loads((run / "endpoint.json").read_text())["url"]
    key = (run / "secrets/api-key").read_text().strip()
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 2}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    over, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while True:
            request = urllib.request.Request(f"{url}/completions", body, headers)
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                statuses.append(response.status)
            if over.is_set():
                return

    person = threading.Thread(target=ask)
    person.start()
    answer = user("batch", *PLAIN[1:], "--endpoint", str(run), "--json")
    over.set()
    person.join()
    assert_complete(user, answer)
    assert json.loads(answer.out)["state"] == "complete"
    assert statuses
    assert set(statuses) == {200}
    again = user("batch", *PLAIN[1:], "--endpoint", str(run))
    assert again.status == 0
    assert "is complete" in again.err
    assert user("status", str(run)).status == 0


# Without any


def test_a_dry_run_prints_prompts_with_their_tokens_and_touches_nothing(user: World) -> None:
    before = everything(user.home)
    answer = user("batch", *PLAIN, "--dry-run")
    assert answer.status == 0, answer.err
    assert "# data.jsonl:1: POST /v1/chat/completions, 8 prompt tokens" in answer.out
    assert '"content": "Tell me about question 0"' in answer.out
    assert '"max_tokens": 6' in answer.out
    told = json.loads(user("batch", *PLAIN, "--dry-run", "--json").out)
    assert told["state"] == "preview"
    assert [one["prompt_tokens"] for one in told["prompts"]] == [8, 8, 8]
    assert told["prompts"][0]["body"]["messages"][0]["content"] == "Tell me about question 0"
    assert everything(user.home) == before


def test_jobs_without_a_result_are_not_repeated_until_the_command_is_given_again(user: World) -> None:
    request = BatchRequest(inputs=("data.jsonl",), output=Path("out"), template=TEMPLATE)
    model = Model(served_name="tiny", path="org/tiny", revision=None)
    directory: BatchDir = begin(request, model).directory
    directory.history.mkdir()
    assert check(directory) == MORE_TO_DO
    for job in range(history.STUCK):
        history.note(
            directory, f"job{job}", None, Progress(), "the endpoint refuses the batch", user.home / "x"
        )
    with pytest.raises(JobError, match="had no result: the endpoint refuses the batch"):
        check(directory)
    assert begin(request, model).resumed
    assert check(directory) == MORE_TO_DO


def test_a_pattern_that_takes_in_the_batches_own_output_is_told_so(user: World) -> None:
    request = BatchRequest(inputs=("*.jsonl",), output=Path(), template=TEMPLATE)
    model = Model(served_name="tiny", path="org/tiny", revision=None)
    begin(request, model)
    written(user.home / "output.jsonl", ROWS)
    with pytest.raises(ConfigError) as caught:
        begin(request, model)
    assert "takes in what is in the output directory" in str(caught.value.hint)


def test_what_is_all_answered_is_merged_without_a_job(user: World) -> None:
    request = BatchRequest(
        inputs=("data.jsonl",), output=Path("out"), template=TEMPLATE, sampling={"max_tokens": 6}
    )
    model = Model(served_name="tiny", path="org/tiny", revision=None)
    directory: BatchDir = begin(request, model).directory
    directory.journals.mkdir()
    journal = JournalWriter(directory.journals)
    body = msgspec.json.encode(
        {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {}}
    )
    for item in range(COUNT):
        journal.append(Entry(item=item, kind=Kind.ANSWER, attempts=1, status=200, body=msgspec.Raw(body)))
    journal.close()
    # A job leaves it to the one that merges, if there is one, and loads no model either way.
    assert check(directory, merge_apart=True) == 0
    assert not (directory.out / "output.jsonl").exists()
    answer = user("batch", *PLAIN)
    assert_complete(user, answer)
    assert "all rows are answered; merging them" in answer.err
    assert not list(user.runs.glob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.jsonl", "t.parquet"), "nothing.jsonl does not exist"),
        (("data.jsonl", "t.parquet"), "neither one of OpenAI's batch output nor a row of results"),
        (("data.jsonl", "t.csv"), "can be converted to .jsonl and .parquet"),
        (("t.j2", "t.jsonl"), "t.j2: results are .jsonl or .parquet"),
        ((".", "t.jsonl"), "holds neither output.jsonl nor errors.jsonl"),
        (("data.jsonl", "data.jsonl"), "is there already"),
    ],
)
def test_what_can_not_be_converted_is_told_and_leaves_nothing(
    user: World, words: tuple[str, str], message: str
) -> None:
    before = everything(user.home)
    answer = user("batch", "convert", *words)
    assert (answer.status, message in answer.err) == (3, True), answer.err
    assert "hint: " in answer.err
    assert everything(user.home) == before
