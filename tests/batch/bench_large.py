"""What a batch of millions of rows takes outside the engines: planning, a driver's books, and the merge.

    python -m tests.batch.bench_large [--rows 10000000]

Each step is a process of its own. The answers are made up and written by the journal's own writer; the driver
takes every request as it would to send it, and marks it as done.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from hpcserve.batch.begin import BatchRequest, Model, begin
from hpcserve.batch.finish import finish
from hpcserve.batch.journal import Entry, Kind
from hpcserve.batch.layout import BatchDir
from hpcserve.batch.members import this_process
from hpcserve.batch.work import Work

_WRITTEN = 100_000
_BODY = msgspec.Raw(
    msgspec.json.encode(
        {"choices": [{"index": 0, "text": "an answer of some words", "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 9, "completion_tokens": 5}}
    )
)  # fmt: skip


def write(folder: Path, rows: int) -> None:
    with (folder / "data.jsonl").open("w") as file:
        for start in range(0, rows, _WRITTEN):
            end = min(start + _WRITTEN, rows)
            file.writelines(f'{{"n": {n}, "q": "what is the square of {n}?"}}\n' for n in range(start, end))


def plan(folder: Path, rows: int) -> None:
    request = BatchRequest(
        inputs=(str(folder / "data.jsonl"),), output=folder / "out", prompt_column="q",
        sampling={"max_tokens": 16},
    )  # fmt: skip
    begin(request, Model(served_name="toy", path="org/toy", revision=None))


def drive(folder: Path, rows: int) -> None:
    work = Work(BatchDir(folder / "out"), this_process({}))
    done = 0
    while (items := work.take()) is not None:
        for spooled in work.requests(items):
            entry = Entry(item=spooled.item, kind=Kind.ANSWER, attempts=1, status=200, body=_BODY)
            work.journal.append(entry)
            work.tally.mark(spooled.item, Kind.ANSWER)
            done += 1
    work.close()
    assert done == rows


def merge(folder: Path, rows: int) -> None:
    merged = finish(BatchDir(folder / "out"))
    assert (merged.items, merged.failed, merged.results) == (rows, 0, rows)


STEPS = {"write": write, "plan": plan, "drive": drive, "merge": merge}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a batch of many rows, without engines.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        began = time.monotonic()
        STEPS[options.step](options.folder, options.rows)
        used = resource.getrusage(resource.RUSAGE_SELF)
        took, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
        print(
            f"{options.step}: {took:.0f} s, {1e6 * cpu / options.rows:.1f} us of CPU time a row,"
            f" {used.ru_maxrss >> 10} MiB",
            flush=True,
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            words = ["--rows", str(options.rows), "--step", step, "--folder", folder]
            subprocess.run([sys.executable, "-m", "tests.batch.bench_large", *words], check=True)
        size = (Path(folder) / "data.jsonl").stat().st_size
        print(f"{options.rows:,} rows of {size / options.rows:.0f} bytes")


if __name__ == "__main__":
    main()
