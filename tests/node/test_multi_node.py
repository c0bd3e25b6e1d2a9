"""A replica over two nodes: its processes live and die together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hpcserve.node.agent.agent import of_another_process
from hpcserve.node.agent.engine_launch import Leader
from hpcserve.node.agent.replica_process import Patience, ReplicaProcess
from hpcserve.node.agent.running_engine import RunningEngine
from hpcserve.node.calls import Calls
from hpcserve.node.head.registry import Heartbeat, Registry
from tests.patience import DEADLINE

from .runs import replica
from .test_registry import beat, registry
from .test_supervision import ChildLauncher, Engine, alive

NAME = "aggregated-0"
# No hang is found here: on a busy machine it would be one more restart than the test made.
PATIENCE = Patience(
    load=30.0, probe=0.05, probe_ready=0.05, hang=30.0, back_off=0.05, most_back_off=0.2, starts=4
)


class Follower(ChildLauncher):
    """The process on the second node: no API, and a leader to follow."""

    leads = False

    def __init__(self, directory: Path, leaders: dict[str, Leader], *mode: str) -> None:
        super().__init__(directory, *mode)
        self.leaders = leaders
        self.followed: list[int] = []

    def leader(self) -> Leader | None:
        return self.leaders.get(NAME)

    def launch(self, generation: int, leader: Leader | None, on_line: Callable[[str], None]) -> RunningEngine:
        assert leader is not None
        assert leader.ports
        self.followed.append(generation)
        running = super().launch(generation, leader, on_line)
        running.url = None
        return running


@dataclass
class Pair:
    """Two agents' processes and the controller's registry between them, without the network."""

    seen: Registry
    processes: list[ReplicaProcess]
    launchers: list[ChildLauncher]
    leaders: dict[str, Leader]
    events: list[str] = field(default_factory=list)

    async def exchange(self) -> None:
        while True:
            for rank, process in enumerate(self.processes):
                body = {"rank": rank, "node": f"n{rank}", "pid": 1, "replicas": [process.snapshot()]}
                news = self.seen.heartbeat(msgspec.convert(body, Heartbeat), time.monotonic())
                self.events += [str(fields.get("message")) for name, fields in news if name == "engine-died"]
                for order in self.seen.restarts(rank).values():
                    process.restart(order["generation"], of_another_process(order))
            self.leaders.clear()
            self.leaders.update(
                {
                    name: Leader(generation=entry["generation"], ports=entry["ports"])
                    for name, entry in self.seen.leaders(1).items()
                }
            )
            await asyncio.sleep(0.02)

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, [process.snapshot() for process in self.processes]
            await asyncio.sleep(0.02)

    def running(self, generation: int) -> bool:
        head, follower = (process.snapshot() for process in self.processes)
        return (head["state"], head["generation"]) == ("ready", generation) and (
            follower["state"],
            follower["generation"],
        ) == ("loading", generation)


@asynccontextmanager
async def pair(tmp_path: Path, *mode: str, patience: Patience = PATIENCE) -> AsyncIterator[Pair]:
    calls = Calls("key", connect_timeout=0.5)
    leaders: dict[str, Leader] = {}
    directories = [tmp_path / "0", tmp_path / "1"]
    for directory in directories:
        directory.mkdir()
    launchers = [ChildLauncher(directories[0]), Follower(directories[1], leaders, *mode)]
    processes = [
        ReplicaProcess(
            name=NAME,
            role="aggregated",
            engine=Engine(),
            launcher=launcher,
            patience=patience,
            healthy=lambda url: calls.healthy(url, 0.3),
            changed=lambda: None,
            ended=lambda pid: None,
        )
        for launcher in launchers
    ]
    both = Pair(registry(2, replica(NAME, 0, 1)), processes, launchers, leaders)
    tasks = [asyncio.create_task(process.run()) for process in processes]
    exchange = asyncio.create_task(both.exchange())
    try:
        yield both
        assert not exchange.done(), exchange.exception()
    finally:
        exchange.cancel()
        for process in processes:
            process.stop(0.0)
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        await asyncio.gather(exchange, return_exceptions=True)
        await calls.close()
        assert not any(alive(running.pid) for launcher in launchers for running in launcher.started)


async def test_the_replica_starts_again_as_a_whole_when_only_its_second_process_dies(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        await both.until(lambda: both.running(1))
        both.launchers[1].started[0].process.kill()
        await both.until(lambda: both.running(2))
        assert both.launchers[0].started[0].process.returncode == -9
        assert any(message.startswith("its process on n1 (rank 1) ended") for message in both.events)
        assert both.processes[0].snapshot()["restarts"] == 1


async def test_the_second_process_starts_again_with_its_head(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        await both.until(lambda: both.running(1))
        both.launchers[0].started[0].process.kill()
        await both.until(lambda: both.running(2))
        assert [len(launcher.started) for launcher in both.launchers] == [2, 2]
        assert both.launchers[1].started[0].process.returncode == -9


async def test_a_second_process_that_always_dies_makes_the_replica_fail(tmp_path: Path) -> None:
    async with pair(tmp_path, "crash") as both:
        await both.until(lambda: both.processes[0].snapshot()["state"] == "failed")
        failure = both.processes[0].snapshot()["failure"]
        assert "its process on n1 ended" in failure["message"]
        assert "boom" in failure["message"]
        assert len(both.launchers[0].started) <= PATIENCE.starts


def test_a_replica_with_a_lost_node_takes_no_requests() -> None:
    seen = registry(2, replica(NAME, 0, 1))
    seen.heartbeat(beat(0, NAME, "ready", ports={"http": 1}), 0)
    seen.heartbeat(beat(1, NAME, "loading"), 0)
    seen.prove(NAME, 1)
    assert [worker.name for worker in seen.workers()] == [NAME]
    seen.heartbeat(beat(0, NAME, "ready", ports={"http": 1}), 5)
    seen.expire(5)
    assert seen.workers() == ()
    assert seen.describe()[0]["state"] == "lost"
    assert seen.describe()[0]["reason"] == "no heartbeat from n1 for 3 s"
    assert seen.hopeless()
    seen.heartbeat(beat(1, NAME, "loading"), 6)
    assert [entry.name for entry in seen.unproven(6)] == [NAME]


def test_a_death_in_an_earlier_generation_restarts_nothing() -> None:
    seen = registry(2, replica(NAME, 0, 1))
    failure = {"cause": "unknown", "message": "boom", "hint": "h"}
    seen.heartbeat(beat(0, NAME, "ready", generation=2, ports={"http": 1}), 0)
    seen.heartbeat(beat(1, NAME, "backoff", generation=1, failure=failure), 0)
    assert seen.restarts(0) == {}
    seen.heartbeat(beat(1, NAME, "backoff", generation=2, failure=failure), 0)
    assert seen.restarts(0)[NAME]["generation"] == 2
    assert seen.restarts(1) == {}
