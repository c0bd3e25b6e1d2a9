"""The driver, on a router of its own with stub engines: every row gets one result, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time

import pytest

from hpcserve.batch.journal import Kind
from hpcserve.batch.tally import Tally
from hpcserve.batch.work import Work
from hpcserve.errors import RunError, StorageError, TooManyErrors
from hpcserve.http.errors import HttpError
from hpcserve.http.exchange import Exchange
from tests.patience import DEADLINE
from tests.router.stubs import Bench, Seen, answer_with, hang

from .planted import driver, endpoint, member, plant, results


async def drive(bench: Bench, directory, tmp_path, *, name: str = "a", end_time=None, **limits):
    work = Work(directory, member(name))
    one, progress, shown = driver(work, endpoint(bench, tmp_path, end_time), **limits)
    try:
        async with asyncio.timeout(DEADLINE):
            return await one.run(), progress, shown.getvalue()
    finally:
        work.close()


async def test_every_row_is_answered_once(start, tmp_path):
    bench = await start("aggregated-0", "aggregated-1")
    directory = plant(tmp_path / "out", 300)
    ended, progress, _ = await drive(bench, directory, tmp_path)
    assert ended == "complete"
    found = results(directory, 300)
    assert len(found) == 300
    assert all(entry.kind == Kind.ANSWER and entry.attempts == 1 for entry in found.values())
    assert progress.results == 300
    seen = [seen.body["prompt"] for stub in bench.stubs.values() for seen in stub.seen]
    assert sorted(seen) == sorted(f"row {n}" for n in range(300))
    assert bench.metric("hpcserve_router_in_flight") == 0


async def test_rows_are_of_batch_class_and_engines_see_none_of_our_headers(start, tmp_path):
    bench = await start("aggregated-0")
    await drive(bench, plant(tmp_path / "out", 3), tmp_path)
    for seen in bench["aggregated-0"].seen:
        assert seen.header(b"x-hpcserve-priority") is None
        assert seen.header(b"x-hpcserve-retries") is None


async def test_what_an_earlier_job_did_is_not_done_again(start, tmp_path):
    bench = await start("aggregated-0")
    directory = plant(tmp_path / "out", 100)

    async def stops(exchange: Exchange, seen: Seen) -> bool:
        if len(bench["aggregated-0"].seen) == 60:
            directory.stop.touch()
        return False

    bench["aggregated-0"].behave = stops
    ended, progress, _ = await drive(bench, directory, tmp_path, end_time=time.time() + 22)
    first = progress.results
    assert ended == "more" or first == 100
    directory.stop.unlink(missing_ok=True)
    ended, progress, _ = await drive(bench, directory, tmp_path, name="b")
    assert ended == "complete"
    assert first + progress.results == 100
    assert len(results(directory, 100)) == 100


async def test_an_engine_that_breaks_off_costs_no_attempt(start, tmp_path):
    bench = await start("aggregated-0", "aggregated-1", retries=2)
    broken = 0

    async def sometimes(exchange: Exchange, seen: Seen) -> bool:
        nonlocal broken
        broken += 1
        if broken % 7 == 3 and broken < 60:
            exchange.abort()
            return True
        return False

    bench["aggregated-0"].behave = sometimes
    directory = plant(tmp_path / "out", 200)
    ended, progress, _ = await drive(bench, directory, tmp_path)
    assert ended == "complete"
    found = results(directory, 200)
    assert {entry.kind for entry in found.values()} == {Kind.ANSWER}
    assert {entry.attempts for entry in found.values()} == {1}
    assert progress.retries["worker_reset"] > 0


async def test_a_row_that_kills_every_engine_is_an_error_after_the_third_and_no_other_is(start, tmp_path):
    bench = await start("aggregated-0", "aggregated-1", "aggregated-2")
    killed: list[int] = []

    async def poisoned(exchange: Exchange, seen: Seen) -> bool:
        if seen.body is not None and seen.body["prompt"] == "row 17":
            killed.append(sum(stub.running for stub in bench.stubs.values()))
            exchange.abort()
            return True
        await asyncio.sleep(0.02)
        return False

    for stub in bench.stubs.values():
        stub.behave = poisoned
    directory = plant(tmp_path / "out", 120)
    ended, _, _ = await drive(bench, directory, tmp_path)
    assert ended == "complete"
    found = results(directory, 120)
    assert {item for item, entry in found.items() if entry.kind == Kind.ERROR} == {17}
    assert found[17].error is not None and found[17].error[0] == "engine_died"
    # A connection that breaks before any byte is replaced once, so each engine may see it twice.
    assert 3 <= len(killed) <= 6
    assert killed[0] > 1
    assert killed[-1] == 1, "the third time it ran alone"
    tally = Tally(directory.journals, 120)
    tally.look()
    assert tally.deaths == {17: 3}


async def test_a_row_of_its_own_fault_is_an_error_at_once(start, tmp_path):
    bench = await start("aggregated-0")
    refuse = answer_with(400, "this row is too long")

    async def picky(exchange: Exchange, seen: Seen) -> bool:
        if seen.body is not None and seen.body["prompt"].endswith("7"):
            return await refuse(exchange, seen)
        return False

    bench["aggregated-0"].behave = picky
    directory = plant(tmp_path / "out", 100)
    ended, progress, _ = await drive(bench, directory, tmp_path)
    assert ended == "complete"
    found = results(directory, 100)
    wrong = {item for item, entry in found.items() if entry.kind == Kind.ERROR}
    assert wrong == set(range(7, 100, 10))
    assert found[7].status == 400
    assert found[7].error is not None and "this row is too long" in found[7].error[1]
    assert len(bench["aggregated-0"].seen) == 100
    assert progress.errors == 10


async def test_rows_that_all_fail_stop_the_batch_early_with_their_errors(start, tmp_path):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = answer_with(400, "no such template")
    directory = plant(tmp_path / "out", 5000)
    with pytest.raises(TooManyErrors, match="no such template") as told:
        await drive(bench, directory, tmp_path)
    assert told.value.exit_code == 9
    assert len(bench["aggregated-0"].seen) <= 60, "the canary was more than twenty rows"


async def test_an_endpoint_that_is_full_gets_the_rows_later(start, tmp_path):
    bench = await start("aggregated-0")
    refuse, refused = answer_with(429, "full"), 0

    async def full(exchange: Exchange, seen: Seen) -> bool:
        nonlocal refused
        refused += 1
        return await refuse(exchange, seen) if refused % 4 == 0 and refused < 40 else False

    bench["aggregated-0"].behave = full
    directory = plant(tmp_path / "out", 80)
    ended, _, _ = await drive(bench, directory, tmp_path)
    assert ended == "complete"
    assert {entry.attempts for entry in results(directory, 80).values()} == {1}


async def test_before_the_walltime_it_stops_taking_rows_and_says_there_is_more(start, tmp_path):
    bench = await start("aggregated-0")
    directory = plant(tmp_path / "out", 50)
    ended, progress, shown = await drive(bench, directory, tmp_path, end_time=time.time() + 5)
    assert (ended, progress.results) == ("more", 0)
    assert "the walltime ends" in shown


async def test_a_router_that_moves_is_found_again(start, tmp_path):
    first = await start("aggregated-0")
    directory = plant(tmp_path / "out", 200)
    second = await Bench().start("aggregated-0")

    async def moves(exchange: Exchange, seen: Seen) -> bool:
        if len(first["aggregated-0"].seen) == 30:
            endpoint(second, tmp_path)
            await first.server.close()
        return False

    first["aggregated-0"].behave = moves
    try:
        ended, _, _ = await drive(first, directory, tmp_path)
    finally:
        await second.close()
    assert ended == "complete"
    assert len(results(directory, 200)) == 200
    assert second["aggregated-0"].seen


async def test_a_refused_key_ends_it_with_the_reason(start, tmp_path):
    bench = await start("aggregated-0")
    directory = plant(tmp_path / "out", 10)
    where = endpoint(bench, tmp_path)
    (tmp_path / "key").write_text("sk-revoked")
    where.find()
    work = Work(directory, member())
    one, _, _ = driver(work, where)
    with pytest.raises(RunError, match="refuses the batch: HTTP 401"):
        await one.run()
    work.close()
    assert results(directory, 10) == {}


async def test_a_disk_that_fills_up_stops_it_loudly_and_nothing_is_lost(start, tmp_path, monkeypatch):
    bench = await start("aggregated-0")
    directory = plant(tmp_path / "out", 100)
    work = Work(directory, member())
    one, _, _ = driver(work, endpoint(bench, tmp_path))
    written, append = 0, work.journal.append

    def full(entry):
        nonlocal written
        written += 1
        if written > 30:
            raise StorageError("can't write there: No space left on device", hint="free space")
        append(entry)

    monkeypatch.setattr(work.journal, "append", full)
    with pytest.raises(StorageError, match="No space left"):
        await one.run()
    work.close()
    assert len(results(directory, 100)) == 30
    assert (await drive(bench, directory, tmp_path, name="b"))[0] == "complete"
    assert len(results(directory, 100)) == 100


async def test_two_jobs_share_the_rows(start, tmp_path):
    bench = await start("aggregated-0", "aggregated-1")
    directory = plant(tmp_path / "out", 600)
    ends = await asyncio.gather(
        drive(bench, directory, tmp_path, name="a"), drive(bench, directory, tmp_path, name="b")
    )
    assert {ended for ended, _, _ in ends} <= {"complete", "others"}
    assert any(ended == "complete" for ended, _, _ in ends)
    assert all(progress.results > 50 for _, progress, _ in ends)
    assert sum(progress.results for _, progress, _ in ends) == 600
    assert len(results(directory, 600)) == 600


async def test_rows_too_long_for_what_is_left_are_left_to_the_next_job_and_the_others_done(start, tmp_path):
    bench = await start("aggregated-0")
    directory = plant(tmp_path / "out", 80)
    real = bench.router.runner.check_walltime

    def check(call, demand):
        if b"row 7" in call.body:
            raise HttpError(503, "the answer would take longer", code="walltime")
        real(call, demand)

    bench.router.runner.check_walltime = check
    ended, progress, shown = await drive(bench, directory, tmp_path)
    assert ended == "more"
    assert progress.results == 80 - 11
    assert "for the next one" in shown
    bench.router.runner.check_walltime = real
    assert (await drive(bench, directory, tmp_path, name="b"))[0] == "complete"
    assert len(results(directory, 80)) == 80


async def test_a_fault_of_our_own_beside_the_rows_ends_the_driver_with_it(start, tmp_path, monkeypatch):
    bench = await start("aggregated-0")
    bench["aggregated-0"].behave = hang
    work = Work(plant(tmp_path / "out", 10), member())
    one, progress, _ = driver(work, endpoint(bench, tmp_path))
    monkeypatch.setattr(progress, "show", lambda *args, **fields: 1 / 0)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ZeroDivisionError):
            await one.run()
    work.close()
