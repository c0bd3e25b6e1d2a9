"""KV blocks on a node's disk stay within their size."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from hpcserve.node.agent.kv_disk import DiskTier, KvDisk, trim
from tests.patience import DEADLINE

BLOCK = 64 << 10


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
