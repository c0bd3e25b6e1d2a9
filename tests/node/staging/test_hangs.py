"""Staging ends when its time is over, whatever a file system or a head node does not do."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcserve.errors import JobError
from hpcserve.node.discovery.facts import Roster, to_json
from hpcserve.node.frames import Channel
from hpcserve.node.staging import coordinator, relay, run, source, worker
from hpcserve.node.staging.trouble import LostHead, NotStaged
from hpcserve.node.staging.worker import coordinator_file
from hpcserve.rundir.atomic import write_json
from tests.node.runs import environment, finish, make_plan, make_run, start
from tests.patience import DEADLINE

from .nodes import Nodes, OwnDisk, facts, files_of, make_model


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path, make_model(tmp_path / "models" / "Tiny-1B"), count=2)


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What takes a file system's place and does not return before the test's end."""
    over = threading.Event()
    monkeypatch.setattr(worker, "SETTLE", 0.2)
    yield lambda *_: over.wait()
    over.set()


async def test_a_shared_file_system_that_hangs_holds_nobody_up(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, hangs: Any
) -> None:
    monkeypatch.setattr(relay, "read_at", hangs)
    monkeypatch.setattr(coordinator, "STALLED", 0.5)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(NotStaged, match="no byte of the model moved"):
            await nodes.stage()
    assert nodes.copies(0) == []


async def test_a_disk_that_hangs_is_no_longer_waited_for_than_ready_timeout(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, hangs: Any
) -> None:
    monkeypatch.setattr("hpcserve.node.staging.copy.Copy.prepare", hangs)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(JobError, match=r"within ready_timeout \(1 s\)"):
            await nodes.stage(ready_timeout=1)


async def test_time_and_nodes_are_watched_while_the_model_is_listed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, hangs: Any
) -> None:
    monkeypatch.setattr(coordinator, "list_model", hangs)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(JobError, match=r"within ready_timeout \(1 s\).*still being listed"):
            await nodes.stage(ready_timeout=1)


HUNG = """
import sys, threading
from hpcserve.node.__main__ import main
from hpcserve.node.staging import coordinator, relay, worker
coordinator.STALLED, worker.SETTLE = 0.5, 0.2
relay.read_at = lambda *_: threading.Event().wait()
sys.exit(main(["stage"]))
"""


def test_the_process_ends_though_its_threads_do_not(nodes: Nodes) -> None:
    plan = make_plan(1)
    plan = replace(plan, model=replace(plan.model, model=str(nodes.model), stage=True))
    plan = replace(
        plan, site=replace(plan.site, storage=replace(plan.site.storage, node_local=str(nodes.disk(0))))
    )
    directory = make_run(nodes.root / "run", plan)
    env = environment(0, HPCSERVE_RUN_DIR=str(directory.path))
    attempt = nodes.inputs(directory, 0).attempt
    write_json(
        directory.roster, to_json(Roster(transport="tcp", attempt=attempt, seconds=0.0, ranks=(facts(0),)))
    )
    status, output = finish(start([sys.executable, "-c", HUNG], env), DEADLINE)
    assert status == 0, output
    assert json.loads(directory.staged.read_text())["path"] is None
    assert "load it from the shared path" in output and "not waited for" in output


class Mute(OwnDisk):
    """A worker that has found a head node which then loses its power."""

    theirs: socket.socket

    async def _find(self) -> Channel:
        ours, self.theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        return Channel(reader, writer, key=b"k", nonces="n", sides=("client", "server"), most=1000)


async def test_a_head_node_without_power_is_given_up(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEAD_SILENT", 0.2)
    directory = make_run(nodes.root / "run", make_plan(2))
    roster = Roster(transport="tcp", attempt="a", seconds=0.0, ranks=(facts(0), facts(1)))
    async with asyncio.timeout(DEADLINE):
        mute = Mute(nodes.inputs(directory, 1), roster, 1)
        with pytest.raises(LostHead):
            await mute.run()
    mute.theirs.close()


async def test_the_coordinator_is_heard_while_it_has_nothing_to_say(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Listens(OwnDisk):
        def _obey(self, order: Any, *rest: Any) -> bool:
            heard.append(order["do"])
            if heard.count("beat") >= 3:
                listed.set()
            return super()._obey(order, *rest)

    listed = threading.Event()
    monkeypatch.setattr(coordinator, "BEAT", 0.05)
    monkeypatch.setattr(
        coordinator, "list_model", lambda path: (listed.wait(DEADLINE), source.list_model(path))[1]
    )
    await nodes.stage(Listens)
    nodes.same(1, files_of(nodes.model))
    assert not list((nodes.root / "run1" / "rendezvous").iterdir())


@pytest.mark.parametrize("ended", [True, False])
async def test_who_lost_the_head_node_looks_whether_the_job_is_an_orphan(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    directory = make_run(nodes.root / "run", make_plan(2))
    inputs = nodes.inputs(directory, 1)
    roster = Roster(transport="tcp", attempt=inputs.attempt, seconds=0.0, ranks=(facts(0), facts(1)))
    write_json(directory.roster, to_json(roster))
    asked: list[Any] = []

    class Lost(Mute):
        async def run(self) -> None:
            self.head = ("127.0.0.1", 7)
            raise LostHead("lost the head node")

    async def end_orphan(inputs: Any, rank: int, head: Any, pause: Any) -> None:
        asked.append((rank, head, await pause(0.0)))

    coordinator_file(inputs).parent.mkdir()
    if not ended:
        write_json(coordinator_file(inputs), {})
    monkeypatch.setattr(run, "Worker", Lost)
    monkeypatch.setattr(run, "end_orphan", end_orphan)
    with pytest.raises(LostHead):
        await run._serve(inputs, 1)
    assert asked == [(1, ("127.0.0.1", 7), ended)]


async def test_a_node_without_a_further_thread_is_a_reason_and_not_a_riddle(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the relay's threads run already: they end before their files are closed."""
    begin, count = threading.Thread.start, iter(range(1000))

    def limited(self: threading.Thread) -> None:
        if "_guard" in repr(getattr(self, "_target", "")) and next(count) % 5 == 4:
            raise RuntimeError("can't start new thread")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(NotStaged, match="no further thread: can't start new thread") as caught:
            await nodes.stage()
    assert "ulimit -u" in str(caught.value.hint)


async def test_a_bug_is_told_and_not_waited_for(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("nobody thought of that")

    monkeypatch.setattr(worker, "schedule", breaks)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(NotStaged, match="nobody thought of that"):
            await nodes.stage()
