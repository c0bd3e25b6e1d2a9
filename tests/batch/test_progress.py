"""What a batch's status says of how far it is and how long it takes."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from hpcserve.batch import progress as module
from hpcserve.batch.journal import Entry, Kind
from hpcserve.batch.progress import Progress
from hpcserve.batch.sending import Outcome
from hpcserve.batch.work import Work

from .planted import member, plant

ITEMS = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def answer(work: Work, progress: Progress, item: int) -> None:
    entry = Entry(item=item, kind=Kind.ANSWER, attempts=1, status=200, body=msgspec.Raw(b"{}"))
    work.journal.append(entry)
    work.tally.mark(item, Kind.ANSWER)
    progress.result(Outcome("answer", 200, prompt_tokens=2, output_tokens=8), 1, answered=True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_at_the_same_time_halve_what_is_left_for_each(tmp_path: Path, clock: Clock, jobs: int) -> None:
    directory = plant(tmp_path / "out", ITEMS)
    works = [Work(directory, member(f"job{number}")) for number in range(jobs)]
    mine, progress = works[0], Progress(io.StringIO())
    mine.members.refresh()
    progress.status(mine, None)
    clock.now += 10.0
    for item in range(100):
        answer(mine, progress, item)
    status = progress.status(mine, None)
    assert (status["done"], status["left"]) == (100, 900)
    assert status["eta_seconds"] == 90 / jobs
    for work in works:
        work.close()
