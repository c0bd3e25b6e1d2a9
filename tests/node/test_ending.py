"""When a run ends, and how much time everybody gets."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcserve.config.site import SlurmSite
from hpcserve.node.head import ending as module
from hpcserve.node.head.ending import ECHO, KILL_MARGIN, Echoes, Ending

from .runs import make_plan


def ending(
    tmp_path: Path,
    *,
    left: float | None = None,
    scheduler: Any = "slurm",
    drain: int = 120,
    walltime: int = 3600,
) -> Ending:
    plan = make_plan(1, walltime=walltime)
    site = replace(plan.site, scheduler=scheduler, slurm=SlurmSite(kill_wait=30))
    plan = replace(plan, site=site, model=replace(plan.model, drain=drain))
    return Ending(plan, None if left is None else time.time() + left, tmp_path / "stop")


def test_signals_that_come_together_are_one() -> None:
    now = 100.0
    echoes = Echoes(lambda: now)
    assert not echoes.again()
    now += ECHO / 2
    assert echoes.again()
    now += ECHO
    assert not echoes.again()


def test_scancel_that_reaches_the_head_twice_drains(tmp_path: Path) -> None:
    told = ending(tmp_path)
    told.on_signal(signal.SIGTERM)
    told.on_signal(signal.SIGUSR1)
    assert (told.reason, told.forced) == ("signal SIGTERM", False)


def test_a_second_signal_by_hand_forces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ECHO", 0.0)
    told = ending(tmp_path)
    told.on_signal(signal.SIGTERM)
    assert told.draining()
    told.on_signal(signal.SIGTERM)
    assert told.forced
    assert not told.draining()
    assert told.grace() == 0.0


def test_stop_drains_and_a_second_stop_forces(tmp_path: Path) -> None:
    told = ending(tmp_path)
    told.stop()
    assert told.asked.is_set()
    assert not told.forced
    told.drain()
    assert not told.forced
    told.stop()
    assert told.forced


def test_drain_and_grace_after_scancel_fit_into_kill_wait(tmp_path: Path) -> None:
    told = ending(tmp_path, left=3000.0)
    told.on_signal(signal.SIGTERM)
    drain = told.until() - time.time()
    assert drain == pytest.approx(15, abs=1)
    told._cut -= drain
    told._killed -= drain
    assert not told.draining()
    assert told.grace() == pytest.approx(30 - drain - KILL_MARGIN, abs=1)


def test_the_signal_of_the_walltime_has_its_name_and_the_whole_drain(tmp_path: Path) -> None:
    told = ending(tmp_path, left=170.0)
    told.on_signal(signal.SIGTERM)
    assert told.reason == "the walltime ends"
    assert told.until() - time.time() == pytest.approx(120, abs=1)
    assert told.grace() == 30 - KILL_MARGIN


async def first_look(told: Ending) -> bool:
    task = asyncio.create_task(told.watch())
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return told.asked.is_set()


@pytest.mark.parametrize(("left", "ends"), [(149.0, True), (155.0, False)])
async def test_without_a_signal_the_whole_drain_lies_before_the_end(
    tmp_path: Path, left: float, ends: bool
) -> None:
    assert await first_look(ending(tmp_path, left=left, scheduler="local")) is ends


async def test_a_short_walltime_does_not_begin_with_its_drain(tmp_path: Path) -> None:
    assert not await first_look(ending(tmp_path, left=59.0, scheduler="local", walltime=60))


def test_a_clock_that_is_set_back_does_not_prolong_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ending(tmp_path, drain=0)
    told.drain()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 7200.0)
    assert not told.draining()
