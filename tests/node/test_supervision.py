"""An engine that crashes, hangs, finds its port taken or won't stop: with real child processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hpcserve.engines.base import Failure
from hpcserve.engines.fake import Fake
from hpcserve.node.agent.engine_launch import Leader
from hpcserve.node.agent.keeper import Keeper
from hpcserve.node.agent.log_pump import LogPump
from hpcserve.node.agent.replica_process import Patience, ReplicaProcess
from hpcserve.node.agent.running_engine import RunningEngine
from hpcserve.node.calls import Calls
from hpcserve.node.ports import PortRange, hold
from tests.patience import DEADLINE

CHILD = Path(__file__).with_name("child.py")
QUICK = Patience(
    load=20.0, probe=0.05, probe_ready=0.05, hang=1.0, back_off=0.05, most_back_off=0.2, starts=4
)


class ChildLauncher:
    """Starts child.py; `mode` says how it misbehaves."""

    def __init__(self, directory: Path, *mode: str) -> None:
        self.directory = directory
        self.mode = mode
        self.started: list[RunningEngine] = []

    leads = True

    def may_start(self) -> bool:
        return True

    def leader(self) -> Leader | None:
        return None

    def launch(self, generation: int, leader: Leader | None, on_line: Callable[[str], None]) -> RunningEngine:
        ports = PortRange(low=28000, high=28999, seed=f"{self.directory} {generation}")
        with hold(ports, "127.0.0.1") as held:
            port = held.first
        process = subprocess.Popen(
            [sys.executable, str(CHILD), str(port), str(generation), *self.mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdout is not None
        log = LogPump(process.stdout, self.directory / "log", on_line)
        running = RunningEngine(process, url=f"http://127.0.0.1:{port}", ports={"http": port}, pump=log)
        self.started.append(running)
        return running


class Engine(Fake):
    def progress(self, line: str) -> str | None:
        return line.strip() if line.startswith("weights") else None

    def diagnose(self, log_tail: str, exit_status: int | None) -> Failure:
        return Failure(cause="test", message=log_tail[-80:], hint="", retry="fatal" not in log_tail)


@asynccontextmanager
async def supervised(
    tmp_path: Path, *mode: str, patience: Patience = QUICK
) -> AsyncIterator[tuple[ReplicaProcess, ChildLauncher]]:
    calls = Calls("key", connect_timeout=0.5)
    launcher = ChildLauncher(tmp_path, *mode)
    replica = ReplicaProcess(
        name="decode-0",
        role="decode",
        engine=Engine(),
        launcher=launcher,
        patience=patience,
        healthy=lambda url: calls.healthy(url, 0.3),
        changed=lambda: None,
        ended=lambda pid: None,
    )
    task = asyncio.create_task(replica.run())
    try:
        yield replica, launcher
    finally:
        replica.stop(0.0)
        await asyncio.wait_for(task, 20)
        await calls.close()
        assert all(running.process.returncode is not None for running in launcher.started)


async def until(replica: ReplicaProcess, state: str, generation: int = 0) -> dict[str, object]:
    deadline = time.monotonic() + DEADLINE
    while True:
        seen = replica.snapshot()
        if seen["state"] == state and seen["generation"] >= generation:
            return seen
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.01)


async def test_an_engine_that_is_killed_starts_again_on_another_port(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (replica, launcher):
        first = await until(replica, "ready")
        assert first["restarts"] == 0
        launcher.started[0].process.kill()
        second = await until(replica, "ready", generation=2)
        assert second["restarts"] == 1
        assert second["url"] != first["url"]
        assert second["failure"] is None


async def test_loading_progress_is_shown_also_from_a_progress_bar(tmp_path: Path) -> None:
    async with supervised(tmp_path, "slow") as (replica, _):
        seen = await until(replica, "loading")
        assert seen["progress"] == "weights 1/2"


async def test_an_engine_that_always_crashes_is_given_up_visibly(tmp_path: Path) -> None:
    async with supervised(tmp_path, "crash") as (replica, launcher):
        seen = await until(replica, "failed")
        assert seen["generation"] == QUICK.starts == len(launcher.started)
        assert "boom" in str(seen["failure"])


async def test_a_failure_that_starting_again_cannot_mend_is_final(tmp_path: Path) -> None:
    async with supervised(tmp_path, "fatal") as (replica, launcher):
        assert (await until(replica, "failed"))["generation"] == 1
        assert len(launcher.started) == 1


async def test_an_engine_that_finds_its_port_taken_gets_others(tmp_path: Path) -> None:
    async with supervised(tmp_path, "port-taken-once") as (replica, launcher):
        seen = await until(replica, "ready", generation=2)
        assert seen["restarts"] == 1
        assert launcher.started[0].ports != launcher.started[1].ports


async def test_a_hung_engine_is_killed_and_started_again(tmp_path: Path) -> None:
    async with supervised(tmp_path, "hang-first") as (replica, launcher):
        await until(replica, "ready")
        await until(replica, "ready", generation=2)
        assert launcher.started[0].process.returncode == -9


async def test_an_engine_that_never_answers_is_a_failure(tmp_path: Path) -> None:
    patience = Patience(load=0.5, probe=0.05, back_off=0.01, starts=1)
    async with supervised(tmp_path, "mute", patience=patience) as (replica, _):
        seen = await until(replica, "failed")
        assert "not ready after 0.5 s" in str(seen["failure"])


async def test_an_engine_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    async with supervised(tmp_path, "stubborn") as (replica, launcher):
        await until(replica, "ready")
        child = int(launcher.started[0].pump.tail().rpartition("child ")[2].split()[0])
        os.kill(child, 0)
        replica.stop(0.3)
        await until(replica, "stopped")
        assert launcher.started[0].process.returncode == -9
        assert not alive(child)


async def test_an_engine_that_obeys_sigterm_ends_by_itself(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (replica, launcher):
        await until(replica, "ready")
        replica.stop(10.0)
        await until(replica, "stopped")
        assert launcher.started[0].process.returncode == 0


async def test_stopping_does_not_wait_for_the_back_off(tmp_path: Path) -> None:
    patience = Patience(load=5.0, back_off=1000.0, most_back_off=1000.0)
    async with supervised(tmp_path, "crash", patience=patience) as (replica, _):
        await until(replica, "backoff")
        replica.stop(1.0)
        await until(replica, "stopped")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_keeper_kills_what_a_killed_agent_leaves(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "from hpcserve.node.agent.keeper import Keeper\n"
        "keeper = Keeper()\n"
        "kept, freed = [subprocess.Popen(['sleep', '60'], start_new_session=True) for _ in range(2)]\n"
        "keeper.add(kept.pid); keeper.add(freed.pid); keeper.remove(freed.pid)\n"
        "print(kept.pid, freed.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    kept, freed = map(int, agent.stdout.readline().split())
    try:
        agent.kill()
        agent.wait(DEADLINE)
        agent.stdout.close()
        deadline = time.monotonic() + DEADLINE
        while alive(kept):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert alive(freed)
    finally:
        os.kill(freed, 9)


def test_the_keeper_ends_with_its_agent_even_when_nothing_is_kept() -> None:
    Keeper().close()


def test_a_log_is_private_and_starts_anew_when_it_is_full(tmp_path: Path, monkeypatch: object) -> None:
    import hpcserve.node.agent.log_pump as module

    limit, module.LOG_LIMIT = module.LOG_LIMIT, 1000
    try:
        reading, writing = socket.socketpair()
        lines: list[str] = []
        pump = LogPump(reading.makefile("rb", buffering=0), tmp_path / "log", lines.append)
        for number in range(100):
            writing.sendall(f"line {number} {'x' * 40}\n".encode())
            time.sleep(0.001)
        writing.close()
        tail = pump.finish(10)
        reading.close()
    finally:
        module.LOG_LIMIT = limit
    assert len(lines) == 100
    assert tail.endswith("line 99 " + "x" * 40)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "log").stat().st_size < 6000
    assert (tmp_path / "log.1").exists()


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    lines: list[str] = []
    pump = LogPump(os.fdopen(reading, "rb", buffering=0), tmp_path / "log", lines.append)
    with os.fdopen(writing, "wb") as engine:
        for _ in range(64):
            engine.write(b"x" * 65536)
        engine.write(b"y\nlast\n")
    tail = pump.finish(20)
    assert tail.endswith("x\nlast")
    assert max(map(len, lines)) <= 8192
    assert (tmp_path / "log").stat().st_size == 64 * 65536 + len(b"y\nlast\n")


def test_an_engine_runs_on_when_its_log_can_not_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    lines: list[str] = []
    (tmp_path / "log").symlink_to("/dev/full")
    pump = LogPump(os.fdopen(reading, "rb", buffering=0), tmp_path / "log", lines.append)
    with os.fdopen(writing, "wb", buffering=0) as engine:
        for number in range(50):
            engine.write(f"line {number}\n".encode())
            time.sleep(0.001)
    assert pump.finish(20).endswith("line 49")
    assert len(lines) == 50
    shown = capfd.readouterr().err
    assert shown.count("warning: ") == 1
    assert "No space left on device" in shown
