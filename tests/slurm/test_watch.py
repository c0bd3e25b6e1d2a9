from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcserve.errors import SlurmDown
from hpcserve.slurm.scheduler import JobState
from hpcserve.slurm.watch import Watch


class Scripted:
    """A scheduler that gives prepared answers, and counts how often it is asked."""

    def __init__(self, *answers: str | SlurmDown) -> None:
        self.answers = list(answers)
        self.asked = 0

    def state(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, SlurmDown):
            raise answer
        return {job: JobState(job_id=job, state=answer) for job in job_ids}

    def submit(self, script: Path, run_dir: Path, *, after: str | None = None) -> str:
        raise NotImplementedError

    def cancel(self, job_id: str, *, force: bool) -> None:
        raise NotImplementedError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def asked_in(seconds: int, scheduler: Scripted, clock: Clock) -> int:
    watch = Watch(scheduler, ["1"], clock=clock)
    for _ in range(seconds * 4):
        watch.poll()
        clock.now += 0.25
    return scheduler.asked


def test_a_job_that_waits_an_hour_is_asked_for_every_half_minute() -> None:
    assert asked_in(3600, Scripted("PENDING"), Clock()) <= 3600 / 30 + 5


def test_a_change_makes_it_look_more_often_again() -> None:
    clock = Clock()
    scheduler = Scripted(*["PENDING"] * 10, "RUNNING")
    watch = Watch(scheduler, ["1"], clock=clock)
    while not (watch.states and watch.poll()["1"].state == "RUNNING"):
        watch.poll()
        clock.now += 1
    before = scheduler.asked
    for _ in range(3):
        clock.now += 1
        watch.poll()
    assert scheduler.asked == before + 1


def test_an_outage_keeps_what_was_known_and_is_asked_less_often() -> None:
    clock = Clock()
    down = SlurmDown("Unable to contact slurm controller")
    scheduler = Scripted("RUNNING", down, down, down, "RUNNING")
    watch = Watch(scheduler, ["1"], clock=clock)
    assert watch.poll()["1"].state == "RUNNING"
    clock.now += 2
    assert watch.poll()["1"].state == "RUNNING"
    assert watch.outage is down
    clock.now += 100
    watch.poll()
    clock.now += 100
    watch.poll()
    clock.now += 100
    assert watch.poll()["1"].state == "RUNNING"
    assert watch.outage is None
