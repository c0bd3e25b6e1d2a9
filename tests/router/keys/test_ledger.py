"""The record of what was used, and what is made of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from hpcserve.router.keys.ledger import Ledger
from hpcserve.router.keys.report import report
from hpcserve.router.keys.usage_file import HOUR, UsageConfig, read, read_all
from tests.patience import DEADLINE

START = 1_800_000_000 // HOUR * HOUR
ALICE, BOB = ("ka", "alice"), ("kb", "bob")


class Clock:
    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


def item(
    who: tuple[str, str], prompt: int, completion: int, *, model: str = "m", cached: int = 0
) -> list[object]:
    return [*who, model, 1, prompt, cached, completion]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(directory: Path, clock: Clock, run: str = "llama", **fields: object) -> Ledger:
    values = {"gpus": 8, "started": float(START), **fields}
    return Ledger(UsageConfig(directory=str(directory), run=run, **values), now=clock)  # type: ignore[arg-type]


def spend(ledger: Ledger, clock: Clock, seconds: int, *, busy: bool) -> None:
    for _ in range(seconds):
        clock.now += 1.0
        ledger.tick(busy=busy)


def test_figures_survive_a_restart_of_the_router(tmp_path: Path, clock: Clock) -> None:
    first = opened(tmp_path, clock)
    first.add([item(ALICE, 100, 10, cached=60), item(BOB, 5, 5)])
    first.close()
    second = opened(tmp_path, clock)
    second.add([item(ALICE, 1, 1)])
    assert second.totals() == {"ka": 112, "kb": 10}
    second.close()
    usage, warnings = read(tmp_path / "llama.jsonl")
    assert not warnings
    (alice,) = [used for used in usage.used.values() if used.name == "alice"]
    assert (alice.requests, alice.prompt, alice.cached, alice.completion) == (2, 101, 60, 11)


def test_figures_of_a_supervisor_that_was_killed_are_there_up_to_its_last_flush(
    tmp_path: Path, clock: Clock
) -> None:
    ledger = opened(tmp_path, clock)
    for _ in range(5):
        ledger.add([item(ALICE, 10, 0)])
        ledger.flush()
    ledger.add([item(ALICE, 1000, 0)])  # never written
    assert opened(tmp_path, clock).totals() == {"ka": 50}


def test_a_torn_tail_is_ignored_with_a_warning_and_later_lines_are_not_lost(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = opened(tmp_path, clock)
    for _ in range(3):
        ledger.add([item(ALICE, 10, 0)])
        ledger.flush()
    path = tmp_path / "llama.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        again = opened(tmp_path, clock)
    assert "cut off" in caplog.text
    assert again.totals() == {"ka": 20}
    again.add([item(ALICE, 1, 0)])
    again.close()
    usage, warnings = read(path)
    assert (usage.totals(), warnings) == ({"ka": 21}, [])


def test_lines_that_are_not_understood_are_counted_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"kind":"used"}\nnonsense\n')
    runs, warnings = read_all(tmp_path)
    assert list(runs) == ["x"]
    assert "2 of 2 lines" in warnings[0]


def test_totals_are_over_all_runs_of_the_directory(tmp_path: Path, clock: Clock) -> None:
    first = opened(tmp_path, clock, "one")
    first.add([item(ALICE, 100, 0)])
    first.close()
    second = opened(tmp_path, clock, "two")
    second.add([item(ALICE, 10, 0)])
    assert second.totals() == {"ka": 110}


def test_storage_that_fails_is_warned_of_once_and_made_up_for(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "usage"
    place.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        ledger = opened(place, clock)
        for _ in range(3):
            ledger.add([item(ALICE, 10, 0)])
            ledger.flush()
        assert len(caplog.records) == 1
        place.unlink()
        place.mkdir()
        ledger.flush()
        assert "nothing of it was lost" in caplog.text
    assert read(place / "llama.jsonl")[0].totals() == {"ka": 30}


@pytest.mark.parametrize("started", [float(START), None])
def test_what_could_not_be_read_at_the_start_is_not_written_over(
    tmp_path: Path, clock: Clock, started: float | None
) -> None:
    first = opened(tmp_path, clock)
    first.add([item(ALICE, 100, 10, cached=60), item(BOB, 5, 5)])
    spend(first, clock, 30, busy=True)
    first.close()
    (tmp_path / "llama.jsonl").rename(tmp_path / "away")
    (tmp_path / "llama.jsonl").mkdir()  # reading it fails, as on a stale handle
    second = opened(tmp_path, clock, started=started)
    second.add([item(ALICE, 1, 1)])
    spend(second, clock, 20, busy=True)
    second.flush()
    (tmp_path / "llama.jsonl").rmdir()
    (tmp_path / "away").rename(tmp_path / "llama.jsonl")
    second.flush()
    assert second.totals() == {"ka": 112, "kb": 10}
    spend(second, clock, 10, busy=False)
    second.close()
    third, warnings = read(tmp_path / "llama.jsonl")
    assert not warnings and third.totals() == {"ka": 112, "kb": 10}
    [time] = third.times.values()
    assert (time.up, time.busy, time.until) == (60.0, 50.0, START + 60.0)


def test_a_file_that_has_grown_is_written_anew(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcserve.router.keys.ledger._GROWTH", 1000)
    ledger = opened(tmp_path, clock)
    for _ in range(500):
        ledger.add([item(ALICE, 1, 1)])
        ledger.flush()
    assert (tmp_path / "llama.jsonl").stat().st_size < 2000
    assert read(tmp_path / "llama.jsonl")[0].totals() == {"ka": 1000}


async def test_relays_are_told_totals_at_first_and_when_they_change(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcserve.router.keys.ledger._TICK", 0.01)
    monkeypatch.setattr("hpcserve.router.keys.ledger._FLUSH_EVERY", 0.01)
    before = opened(tmp_path, clock)
    before.add([item(ALICE, 7, 0)])
    before.close()
    ledger, told = opened(tmp_path, clock), []
    work = asyncio.create_task(ledger.run(busy=lambda: True, tell=lambda totals: told.append(dict(totals))))
    async with asyncio.timeout(DEADLINE):
        while not told:  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.005)
        ledger.add([item(ALICE, 3, 0)])
        while len(told) < 2 or read(tmp_path / "llama.jsonl")[0].totals() != told[1]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert told == [{"ka": 7}, {"ka": 10}]
    work.cancel()
    await asyncio.wait((work,))


def test_gpu_hours_are_shared_out_by_work_and_idle_time_is_nobodys(tmp_path: Path, clock: Clock) -> None:
    ledger = opened(tmp_path, clock)
    spend(ledger, clock, 900, busy=False)
    ledger.add([item(ALICE, 600, 100, cached=100), item(BOB, 100, 0)])  # 500 + 4 * 100, and 100
    spend(ledger, clock, 1800, busy=True)
    ledger.close()
    found = report(read_all(tmp_path)[0], by="user")
    hours = {row.name: round(row.gpu_hours, 6) for row in found.rows}
    assert hours == {"alice": 8 * 0.5 * 0.9, "bob": 8 * 0.5 * 0.1}
    assert found.idle_gpu_hours == pytest.approx(8 * 0.25)
    assert found.rows[0].cached_tokens == 100


def test_the_time_before_the_router_and_between_two_of_them_counts(tmp_path: Path, clock: Clock) -> None:
    clock.now += 600.0  # the engines loaded
    ledger = opened(tmp_path, clock)
    spend(ledger, clock, 10, busy=False)
    ledger.close()
    clock.now += 100.0  # the router was started again
    ledger = opened(tmp_path, clock)
    spend(ledger, clock, 10, busy=False)
    ledger.close()
    assert report(read_all(tmp_path)[0], by="run").idle_gpu_hours == pytest.approx(8 * 720 / HOUR)


def test_another_job_of_the_same_name_does_not_pay_for_the_time_between(tmp_path: Path, clock: Clock) -> None:
    ledger = opened(tmp_path, clock)
    spend(ledger, clock, 10, busy=False)
    ledger.close()
    clock.now += 50_000.0
    ledger = opened(tmp_path, clock, started=clock.now)
    spend(ledger, clock, 10, busy=False)
    ledger.close()
    assert report(read_all(tmp_path)[0], by="run").idle_gpu_hours == pytest.approx(8 * 20 / HOUR)


def test_an_hour_whose_requests_end_later_is_shared_out_as_the_run_is(tmp_path: Path, clock: Clock) -> None:
    ledger = opened(tmp_path, clock)
    spend(ledger, clock, HOUR + 100, busy=True)
    ledger.add([item(ALICE, 10, 10)])
    ledger.close()
    found = report(read_all(tmp_path)[0], by="user")
    assert found.rows[0].gpu_hours == pytest.approx(8 * (HOUR + 100) / HOUR)
    assert found.idle_gpu_hours == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("user", {"alice", "run"}),
        ("key", {"ka (alice)", "kc (alice)", "run"}),
        ("model", {"m", "lora"}),
        ("run", {"llama"}),
    ],
)
def test_groupings(tmp_path: Path, clock: Clock, by: str, names: set[str]) -> None:
    ledger = opened(tmp_path, clock)
    ledger.add([item(ALICE, 1, 1), item(("kc", "alice"), 1, 1, model="lora"), item(("run", "run"), 1, 1)])
    ledger.close()
    found = report(read_all(tmp_path)[0], by=by)  # type: ignore[arg-type]
    assert {row.name for row in found.rows} == names
    assert sum(row.requests for row in found.rows) == 3


def test_since_leaves_earlier_hours_out(tmp_path: Path, clock: Clock) -> None:
    ledger = opened(tmp_path, clock)
    ledger.add([item(ALICE, 1, 0)])
    spend(ledger, clock, 3 * HOUR, busy=False)
    ledger.add([item(ALICE, 10, 0)])
    ledger.close()
    found = report(read_all(tmp_path)[0], by="user", since=START + 3.0 * HOUR)
    assert found.rows[0].prompt_tokens == 10
    assert found.idle_gpu_hours == 0.0
