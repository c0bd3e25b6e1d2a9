"""The agent: one per node. It supervises the node's engines and reports to the controller.

It outlives its engines, and survives the other nodes: only the controller's silence, a command or a
signal ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from ... import engines
from ...engines.base import Failure
from ...engines.kv_events.messages import KvMessage
from ...errors import JobError, StorageError
from ...rundir.atomic import read_json
from ..calls import CallFailed, Calls
from ..console import say, warn
from ..discovery.addresses import in_url
from ..discovery.facts import RankFacts, Roster, wait_for_roster
from ..head.ending import KILL_MARGIN, Echoes
from ..inputs import Inputs
from ..rank import rank_of
from ..staging.copy import Lease
from ..staging.staged import wait_for_staged
from .cores import share_cores
from .engine_launch import EngineLauncher, Leader
from .keeper import Keeper
from .kv_disk import KvDisk
from .kv_news import KvNews
from .orphan import end_orphan
from .replica_process import Patience, ReplicaProcess
from .scratch import Scratch
from .seat import Seat
from .shared_kv import SharedKv, shared_tier

HEARTBEAT = 1.0
_LEAST_PAUSE = 0.02
_DISCARD = 9
"""A port (RFC 863) that a node refuses which lives."""
HEAD_WAIT = 120.0
"""Seconds for the first contact with the controller."""
HEAD_LOST = 60.0
"""Seconds without the controller after which the engines have nobody to work for."""
_ANSWER = 1.5
"""Seconds for one answer of the controller: two reports must fit into the time after which an agent
is called lost."""


def run_agent(inputs: Inputs) -> int:
    """Serve until told to stop. Raises JobError when the controller stays away."""
    rank = rank_of(inputs.environ)
    # Forks, so before there is any thread.
    keeper = Keeper()
    try:
        asyncio.run(_main(inputs, rank, keeper))
    finally:
        keeper.close()
    return 0


async def _main(inputs: Inputs, rank: int, keeper: Keeper) -> None:
    roster = await wait_for_roster(inputs.run, inputs.attempt)
    staged = (await wait_for_staged(inputs.run, inputs.attempt)).path if inputs.plan.model.stage else None
    lease = Lease(staged) if staged is not None else None
    agent = Agent(inputs, roster, rank, keeper, model_path=staged or inputs.plan.model.model)
    try:
        await agent.run()
    finally:
        await agent.close()
        if lease is not None:
            lease.end(keep=inputs.plan.site.storage.keep_staged)


class Agent:
    def __init__(self, inputs: Inputs, roster: Roster, rank: int, keeper: Keeper, *, model_path: str) -> None:
        self._inputs = inputs
        self._model_path = model_path
        self._roster = roster
        self._rank = rank
        self._keeper = keeper
        self._calls = Calls(inputs.job_key)
        self._changed = asyncio.Event()
        self._leaders: Mapping[str, Leader] = {}
        self._seats: Mapping[str, Mapping[int, str]] = {}
        """Directories for replicas on further nodes, by the replica's name and the node's rank."""
        self._head: Mapping[str, Any] | None = None
        """head.json of this attempt as it was last read; None until it must be read again."""
        self._head_port = _DISCARD
        self._echoes = Echoes()
        self._signalled: float | None = None
        """When (monotonic) the first signal to end came."""
        self._stop_asked = False
        self._over = False
        self._heard = time.monotonic() + (HEAD_WAIT - HEAD_LOST)
        """When the controller last answered; at first, HEAD_WAIT is granted instead of HEAD_LOST."""
        self._lost: JobError | None = None
        self._scratch = Scratch(inputs.plan.site.storage.node_local, keeper)
        self._launched: list[tuple[ReplicaProcess, EngineLauncher]] = []
        self._replicas = self._supervise()
        tiers = (launcher.disk_tier() for _, launcher in self._launched)
        self._kv_disk = KvDisk([tier for tier in tiers if tier is not None])
        self._shared_kv = SharedKv(shared_tier(inputs.plan, rank, inputs.run.path))
        self._kv_news = KvNews(
            rank,
            [(replica, launcher.kv_event_sources()) for replica, launcher in self._launched],
            self._send_kv_news,
        )

    @property
    def _facts(self) -> RankFacts:
        return self._roster.ranks[self._rank]

    def _supervise(self) -> list[ReplicaProcess | Seat]:
        plan = self._inputs.plan
        engine = engines.of(plan.model)
        cores = share_cores(plan, self._roster.ranks)
        replicas: list[ReplicaProcess | Seat] = []
        for replica in plan.on_node(self._rank):
            scratch = self._scratch.path / replica.name
            if engine.in_step(replica) and replica.nodes[0] != self._rank:
                seat = Seat(name=replica.name, role=replica.role, scratch=scratch, changed=self._changed.set)
                replicas.append(seat)
                continue
            launcher = EngineLauncher(
                plan=plan,
                replica=replica,
                roster=self._roster,
                rank=self._rank,
                model_path=self._model_path,
                engine=engine,
                key=self._inputs.job_key,
                environ=self._inputs.environ,
                cpus=cores.get((self._rank, replica.name), ()),
                scratch=scratch,
                run_dir=self._inputs.run.path,
                log=self._inputs.run.logs / f"{replica.name}.{self._facts.node}.log",
                keeper=self._keeper,
                expect_in_memory=self._scratch.expect,
                find_leader=lambda name: self._leaders.get(name),
                find_seats=lambda name: self._seats.get(name, {}),
            )
            process = ReplicaProcess(
                name=replica.name,
                role=replica.role,
                engine=engine,
                launcher=launcher,
                patience=Patience(load=plan.ready_timeout),
                healthy=self._calls.healthy,
                changed=self._changed.set,
                ended=self._keeper.remove,
            )
            self._launched.append((process, launcher))
            replicas.append(process)
        return replicas

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        # SIGUSR1: what the job script sends through srun, which would kill its tasks for SIGTERM.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, self._on_signal, number)
        self._scratch.sweep()
        supervisors = [asyncio.create_task(replica.run()) for replica in self._replicas]
        heart = asyncio.create_task(self._beat())
        news = asyncio.create_task(self._kv_news.run())
        news.add_done_callback(_say_why)
        disk = asyncio.create_task(self._kv_disk.run())
        disk.add_done_callback(_say_disk)
        shared = asyncio.create_task(self._shared_kv.run())
        shared.add_done_callback(_say_shared)
        try:
            # A supervisor that raises is a bug, and must not leave a silent agent behind.
            await _all_or_error(supervisors, heart)
            self._over = True
            self._changed.set()
            await heart
        finally:
            for task in (*supervisors, heart, news, disk, shared):
                task.cancel()
            await asyncio.gather(*supervisors, heart, news, disk, shared, return_exceptions=True)
        if self._lost is not None:
            head = (self._roster.ranks[0].address, self._head_port)
            await end_orphan(self._inputs, self._rank, head, self._pause)
            raise self._lost

    async def _pause(self, seconds: float) -> bool:
        """True when a signal to end came, before or meanwhile."""
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                while self._signalled is None:
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            return False
        return True

    def _on_signal(self, number: signal.Signals) -> None:
        """The first is left to the controller, which drains and then says when to stop; a second forces."""
        if self._echoes.again():
            return
        first = self._signalled is None
        self._signalled = self._signalled or time.monotonic()
        if not first or self._stop_asked:
            say(f"agent: {number.name}: killing the engines")
            self._stop(0.0)
            return
        say(f"agent: {number.name}: the run ends")
        for replica in self._replicas:
            replica.drain()
        self._changed.set()

    def _stop(self, grace: float) -> None:
        self._stop_asked = True
        for replica in self._replicas:
            replica.stop(grace)
        self._changed.set()

    async def _beat(self) -> None:
        """Report every second, and at each change; last of all, that everything is stopped."""
        while True:
            last = self._over
            due = time.monotonic() + HEARTBEAT
            self._changed.clear()
            answered = await self._report()
            if last:
                return
            self._check_signal(answered)
            self._check_head()
            try:
                # Not one second after the answer: a slow one would make the next report late as well.
                async with asyncio.timeout(max(_LEAST_PAUSE, due - time.monotonic())):
                    await self._changed.wait()
                # Changes come in swarms; one report carries them all.
                await asyncio.sleep(_LEAST_PAUSE)
            except TimeoutError:
                continue

    def _check_signal(self, answered: bool) -> None:
        """After a signal: without a controller, or when it takes too long, the engines are stopped."""
        if self._signalled is None or self._stop_asked:
            return
        if not answered or time.monotonic() - self._signalled > self._kill_wait / 2 + HEARTBEAT:
            self._stop(self._grace())

    def _check_head(self) -> None:
        """Without a controller the engines have nobody to work for."""
        if time.monotonic() - self._heard > HEAD_LOST and self._lost is None:
            self._lost = JobError(
                f"rank {self._rank} ({self._facts.node}) can't reach the controller on the head node"
                " any more: its engines are stopped",
                hint="did the head node die? logs/head.log and `sacct` say",
            )
            self._stop(self._grace())

    @property
    def _kill_wait(self) -> float:
        return float(self._inputs.plan.site.slurm.kill_wait)

    def _grace(self) -> float:
        """Seconds the engines get when nobody else says: what Slurm leaves of KillWait."""
        gone = 0.0 if self._signalled is None else time.monotonic() - self._signalled
        return max(1.0, self._kill_wait - KILL_MARGIN - gone)

    async def _report(self) -> bool:
        """One heartbeat; False when the controller did not answer."""
        if self._head is None:
            # In a thread, and not at each heartbeat: the shared file system may hang.
            self._head = await asyncio.to_thread(read_head, self._inputs)
            if self._head is None:
                return False
            self._head_port = int(self._head["port"])
        body = {
            "rank": self._rank,
            "node": self._facts.node,
            "address": self._facts.address,
            "pid": os.getpid(),
            "replicas": [replica.snapshot() for replica in self._replicas],
        }
        try:
            answer = await self._calls.json("POST", self._desk(self._head), body, seconds=_ANSWER)
        except CallFailed:
            # The next heartbeat is the retry; HEAD_LOST bounds them.
            self._head = None
            return False
        self._heard = time.monotonic()
        self._obey(answer)
        return True

    def _desk(self, head: Mapping[str, Any]) -> str:
        return f"http://{in_url(head['address'])}:{head['port']}/agents/{self._rank}"

    async def _send_kv_news(self, news: list[tuple[str, KvMessage]]) -> bool:
        if self._head is None:
            return False
        try:
            await self._calls.json("POST", f"{self._desk(self._head)}/kv", {"news": news}, seconds=_ANSWER)
        except CallFailed:
            return False
        return True

    def _obey(self, answer: Mapping[str, Any]) -> None:
        self._kv_news.round(answer.get("kv_round"))
        self._leaders = {
            name: Leader(
                generation=int(entry["generation"]), ports=entry["ports"], ready=bool(entry.get("ready"))
            )
            for name, entry in answer.get("leaders", {}).items()
        }
        self._seats = {
            name: {int(rank): scratch for rank, scratch in entry.items()}
            for name, entry in answer.get("seats", {}).items()
        }
        for replica in self._replicas:
            order = answer.get("restart", {}).get(replica.name)
            if order is not None:
                replica.restart(int(order["generation"]), of_another_process(order))
        if answer.get("command") == "drain":
            for replica in self._replicas:
                replica.drain()
        elif answer.get("command") == "stop":
            self._stop(float(answer.get("grace", 0.0)))

    async def close(self) -> None:
        """Everything but the scratch directory, which the keeper removes."""
        await self._calls.close()


def of_another_process(order: Mapping[str, Any]) -> Failure:
    """Why a replica's head is to start again, from the controller's order."""
    return Failure(
        cause=str(order.get("cause") or "unknown"),
        message=f"its process on {order['node']} ended: {order.get('message')}",
        hint=str(order.get("hint") or ""),
        retry=not order["final"],
    )


def read_head(inputs: Inputs) -> Mapping[str, Any] | None:
    """head.json of this attempt; None while there is none."""
    try:
        head = read_json(inputs.run.head)
    except FileNotFoundError:
        return None
    except StorageError as error:
        # The shared file system hiccups; the controller's silence is counted elsewhere.
        warn(error.message, error.hint)
        return None
    return head if isinstance(head, dict) and head.get("attempt") == inputs.attempt else None


def _say_why(task: asyncio.Task[None]) -> None:
    """Without KV news the run goes on, and the router predicts."""
    if not task.cancelled() and (error := task.exception()) is not None:
        warn(f"KV events are no longer read: {error!r}", "this is a bug in hpcserve")


def _say_disk(task: asyncio.Task[None]) -> None:
    """The engines go on, and may fill the disk."""
    if not task.cancelled() and (error := task.exception()) is not None:
        warn(
            f"KV blocks on the node's disk are no longer kept within `kv_offload.disk_gib`: {error!r}",
            "can the directory of `storage.node_local` still be read and written?",
        )


def _say_shared(task: asyncio.Task[None]) -> None:
    """The engines write no more there."""
    if not task.cancelled() and (error := task.exception()) is not None:
        warn(
            f"the directory of `storage.kv` is no longer looked after: {error!r}", "this is a bug in hpcserve"
        )


async def _all_or_error(supervisors: list[asyncio.Task[None]], heart: asyncio.Task[None]) -> None:
    waiting = {*supervisors, heart}
    while any(not task.done() for task in supervisors):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
