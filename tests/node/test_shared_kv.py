"""The first agent of a run keeps the shared KV blocks within their size, and says what may be written."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcserve.config.model import KvOffloadSpec
from hpcserve.config.site import StorageSite
from hpcserve.engines.kv_files import ROOM
from hpcserve.node.agent.shared_kv import SharedKv, SharedTier, shared_tier
from tests.patience import DEADLINE
from tests.plan.cases import GIB, model, plan, replace, site, tp

BLOCK = 64 << 10


def block(directory: Path, number: int) -> Path:
    path = directory / f"llama-0/{number:02}/{number}-0.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(BLOCK))
    os.utime(path, (number, number))
    return path


def allowed(run: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((run / ROOM).read_text()) if (run / ROOM).exists() else {}
    return found


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def looked(run: Path, times: int) -> dict[str, int]:
    """What is allowed after so many further looks."""
    await until(lambda: bool(allowed(run)))
    first = allowed(run)["look"]
    await until(lambda: allowed(run)["look"] >= first + times)
    return allowed(run)


async def test_what_nobody_used_for_longest_goes_and_what_is_allowed_finds_room(tmp_path: Path) -> None:
    directory, run = tmp_path / "kv", tmp_path / "run"
    run.mkdir()
    blocks = [block(directory, number) for number in range(20)]
    os.utime(blocks[0])  # used again
    left = directory / "llama-0/00/x.bin.node.1.2.tmp"
    left.touch()
    os.utime(left, (1, 1))
    tier = SharedTier(directory=str(directory), size=10 * BLOCK, writers=2, run_dir=run)
    task = asyncio.create_task(SharedKv(tier, every=0.01).run())
    try:
        found = await looked(run, 0)
        assert [each.exists() for each in blocks] == [True] + [False] * 12 + [True] * 7
        assert not left.exists()
        # A tenth, for both together: with the 8 that are there it is less than all.
        assert 0.49 * BLOCK < found["bytes"] <= 0.5 * BLOCK
        block(directory, 30), block(directory, 31)
        await looked(run, 2)
        assert sum(each.stat().st_size for each in directory.rglob("*.bin")) <= 9 * BLOCK
    finally:
        task.cancel()


async def test_a_directory_that_is_gone_allows_nothing_and_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, run = tmp_path / "kv", tmp_path / "run"
    run.mkdir()
    tier = SharedTier(directory=str(directory), size=10 * BLOCK, writers=1, run_dir=run)
    shared = SharedKv(tier, every=0.01)
    task = asyncio.create_task(shared.run())
    try:
        await until(lambda: "can't be looked after" in capfd.readouterr().err)
        assert not allowed(run)
        directory.mkdir()
        await looked(run, 1)
        assert "can be looked after again" in capfd.readouterr().err
    finally:
        task.cancel()


def test_the_first_agent_looks_for_all_writers(tmp_path: Path) -> None:
    at = replace(site(), storage=StorageSite(kv="/lustre/kv"))
    spec = model(
        prefill=tp(8), decode=tp(1, data_parallel=8), kv_offload=KvOffloadSpec(cpu_gib=9, shared_gib=5)
    )
    planned = plan(spec, at, nodes=3)
    tier = shared_tier(planned, 0, tmp_path)
    assert tier is not None
    assert (tier.directory, tier.size) == ("/lustre/kv", 5 * GIB)
    assert tier.writers == sum(each.data_parallel for each in planned.replicas) > 8
    assert shared_tier(planned, 1, tmp_path) is None
    assert shared_tier(plan(), 0, tmp_path) is None


def test_a_file_system_that_hangs_does_not_hold_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, back, ended = threading.Event(), threading.Event(), threading.Event()

    def hangs(_: object) -> int:
        begun.set()
        back.wait(DEADLINE)
        ended.set()
        return 0

    monkeypatch.setattr("hpcserve.node.agent.shared_kv.trim", hangs)
    tier = SharedTier(directory=str(tmp_path), size=GIB, writers=1, run_dir=tmp_path)

    async def agent() -> None:
        task = asyncio.create_task(SharedKv(tier).run())
        await until(begun.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    try:
        asyncio.run(agent())
        assert not ended.is_set()
    finally:
        back.set()
