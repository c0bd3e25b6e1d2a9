"""KV blocks on a node's disk stay within their size."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcserve.node.agent import block_census
from hpcserve.node.agent.block_census import Census, Stopped
from hpcserve.node.agent.kv_disk import DiskTier, KvDisk, Look, rest, trim
from tests.patience import DEADLINE

BLOCK = 4 << 10


def block(directory: Path, number: int) -> Path:
    path = directory / f"r0/{number:03}/ab_g0/{number}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(BLOCK))
    os.utime(path, (number, number))
    return path


def test_what_was_written_longest_ago_goes_first(tmp_path: Path) -> None:
    blocks = [block(tmp_path, number) for number in range(10)]
    (tmp_path / "config.json").write_text("{}")
    tier = DiskTier(directory=str(tmp_path), size=5 * BLOCK)
    assert trim(tier) == 6 * BLOCK
    assert [path.exists() for path in blocks] == [False] * 6 + [True] * 4
    assert (tmp_path / "config.json").exists()
    assert trim(tier) == 0


def test_a_block_that_is_being_written_and_a_directory_to_come_are_left_alone(tmp_path: Path) -> None:
    assert trim(DiskTier(directory=str(tmp_path / "none"), size=1)) == 0
    half = tmp_path / "1.bin.tmp"
    half.write_bytes(os.urandom(BLOCK))
    assert trim(DiskTier(directory=str(tmp_path), size=1)) == 0
    assert half.exists()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_looks_again_and_again(tmp_path: Path) -> None:
    tier = DiskTier(directory=str(tmp_path), size=BLOCK)
    task = asyncio.create_task(KvDisk([tier], every=0.01).run())
    try:
        for number in range(4):
            block(tmp_path, number)
        await until(lambda: len(list(tmp_path.rglob("*.bin"))) <= 1)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def settle(directory: Path) -> None:
    """As if nothing had changed for long."""
    for parent, _, _ in os.walk(directory):
        os.utime(parent, (1, 1))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories that were listed."""
    seen: list[str] = []
    real = os.scandir

    def scandir(path: str) -> Any:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return seen


def test_only_directories_that_changed_are_listed_again(tmp_path: Path, listed: list[str]) -> None:
    for number in range(10):
        block(tmp_path, number)
    settle(tmp_path)
    census = Census(str(tmp_path))
    assert census.count() == 10 * BLOCK
    listed.clear()
    assert census.count() == 10 * BLOCK
    assert listed == []
    new = block(tmp_path, 3).with_name("3b.bin")
    new.write_bytes(os.urandom(BLOCK))
    assert census.count() == 11 * BLOCK
    # It changed a moment ago, and may have changed again since, at what is the same time for the file system.
    assert census.count() == 11 * BLOCK
    assert listed == [str(new.parent)] * 2
    settle(tmp_path)
    census.count()
    listed.clear()
    block(tmp_path, 42)
    assert census.count() == 12 * BLOCK
    assert str(tmp_path / "r0/003") not in listed


def test_directories_that_come_go_and_get_others_are_counted_right(tmp_path: Path) -> None:
    census = Census(str(tmp_path / "later"))
    assert census.count() == 0
    (tmp_path / "later/a").mkdir(parents=True)
    assert census.count() == 0
    (tmp_path / "later/a/1.bin").write_bytes(os.urandom(BLOCK))
    assert census.count() == BLOCK
    block(tmp_path / "later/a", 7)
    assert census.count() == 2 * BLOCK
    (tmp_path / "later/a/r0/007/ab_g0/7.bin").unlink()
    (tmp_path / "later/a/r0/007/ab_g0").rmdir()
    assert census.count() == BLOCK
    (tmp_path / "later/b.bin").write_bytes(os.urandom(BLOCK))
    assert census.count() == 2 * BLOCK


def test_the_size_holds_between_two_looks(tmp_path: Path) -> None:
    look = Look(DiskTier(directory=str(tmp_path), size=20 * BLOCK))
    for number in range(80):
        block(tmp_path, number)
        if number % 4 == 3:
            assert len(list(tmp_path.rglob("*.bin"))) <= 20
            look.again()
    kept = {int(path.stem) for path in tmp_path.rglob("*.bin")}
    assert kept == set(range(80 - len(kept), 80)) and len(kept) >= 10


def test_a_long_look_is_followed_by_a_short_rest() -> None:
    assert rest(0.01, 5.0) == 5.0
    assert rest(5.0, 5.0) == 20.0
    assert rest(150.0, 5.0) == 30.0


def test_ages_are_told_apart_less_finely_where_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_census, "_AGES", 4)
    for number in range(64):
        block(tmp_path, number)
    assert trim(DiskTier(directory=str(tmp_path), size=40 * BLOCK)) >= 28 * BLOCK
    kept = {int(path.stem) for path in tmp_path.rglob("*.bin")}
    # Of one age, those that go are any; here it is 16 seconds.
    assert 30 <= len(kept) <= 36 and kept >= set(range(48, 64)) and not kept & set(range(16))


async def test_a_look_does_not_outlive_its_agent(tmp_path: Path) -> None:
    census = Census(str(tmp_path))
    block(tmp_path, 1)
    census.stop()
    with pytest.raises(Stopped):
        census.count()
    disk = KvDisk([DiskTier(directory=str(tmp_path), size=0)])
    task = asyncio.create_task(disk.run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    block(tmp_path, 2)
    assert disk._looks[0].again() == 0
