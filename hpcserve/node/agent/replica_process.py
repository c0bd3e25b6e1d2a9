"""Keeps one process of a replica alive: start, watch, restart with back-off, stop."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...engines.base import Engine, Failure
from ...errors import HpcserveError
from .engine_launch import Leader
from .running_engine import RunningEngine
from .step import NodeGone

State = Literal["starting", "loading", "ready", "backoff", "failed", "draining", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take; all in seconds."""

    load: float
    """From start to the first answer on the health path."""
    probe: float = 0.25
    """Between two probes while loading; afterwards `probe_ready`."""
    probe_ready: float = 1.0
    hang: float = 30.0
    """A ready engine may be silent for so long before it is killed."""
    back_off: float = 1.0
    most_back_off: float = 30.0
    window: float = 600.0
    starts: int = 6
    """Starts within `window` after which it is given up."""


class Launcher(Protocol):
    @property
    def leads(self) -> bool: ...
    def may_start(self) -> bool: ...
    def leader(self) -> Leader | None: ...
    def launch(
        self, generation: int, leader: Leader | None, on_line: Callable[[str], None]
    ) -> RunningEngine: ...


class ReplicaProcess:
    """Supervises one engine process. `run()` ends when it was stopped, or given up for good."""

    def __init__(
        self,
        *,
        name: str,
        role: str,
        engine: Engine,
        launcher: Launcher,
        patience: Patience,
        healthy: Callable[[str], Awaitable[bool]],
        changed: Callable[[], None],
        ended: Callable[[int], None],
    ) -> None:
        self.name = name
        self._role = role
        self._engine = engine
        self._launcher = launcher
        self._patience = patience
        self._healthy = healthy
        self._changed = changed
        self._ended = ended
        self._state: State = "starting"
        self._running: RunningEngine | None = None
        self._generation = 0
        self._progress: str | None = None
        self._ready_seconds: float | None = None
        self._failure: Failure | None = None
        self._restart_in: float | None = None
        self._starts: deque[float] = deque()
        self._in_a_row = 0
        self._deadline = math.inf
        self._draining = False
        self._ordered: Failure | None = None
        """Why the running process is to be started again; said by the controller."""
        self._stopping = asyncio.Event()

    def snapshot(self) -> dict[str, Any]:
        """This process's entry in the agent's heartbeat."""
        failure = self._failure
        return {
            "name": self.name,
            "role": self._role,
            "state": "draining" if self._draining and self._state == "ready" else self._state,
            "url": self._running.url if self._running else None,
            "ports": dict(self._running.ports) if self._running else {},
            "generation": self._generation,
            "progress": self._progress,
            "ready_seconds": self._ready_seconds,
            "restarts": max(0, self._generation - 1),
            "restart_in": self._restart_in,
            "failure": failure and {"cause": failure.cause, "message": failure.message, "hint": failure.hint},
        }

    @property
    def ready_generation(self) -> int | None:
        """The start that answers requests now, or computes for the process that does; None while none
        does."""
        if self._running is None:
            return None
        if self._running.url is None:
            leader = self._leader()
            ready = leader is not None and leader.ready and leader.generation == self._generation
        else:
            ready = self._state == "ready"
        return self._generation if ready else None

    def drain(self) -> None:
        """Say that requests are no longer wanted; the engine finishes what it has."""
        self._draining = True

    def stop(self, grace: float) -> None:
        """End the engine: SIGTERM now, SIGKILL after `grace` seconds. A second call may shorten it."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + grace)
        self._stopping.set()

    def restart(self, generation: int, failure: Failure) -> None:
        """Start again if it is still at `generation`: another process of the replica is dead."""
        if generation == self._generation and self._running is not None:
            self._ordered = failure

    async def run(self) -> None:
        while not self._stopping.is_set():
            if not self._due():
                await self._nap(0.1)
                continue
            failure = await self._live_once()
            if failure is None:
                self._set("starting")
            elif not await self._may_start_again(failure):
                await self._stopping.wait()
        self._set("stopped")

    def _due(self) -> bool:
        """A process that follows starts once for each start of its leader."""
        if self._launcher.leads:
            return self._launcher.may_start()
        leader = self._leader()
        return leader is not None and leader.generation != self._generation

    def _leader(self) -> Leader | None:
        return None if self._launcher.leads else self._launcher.leader()

    def _left_behind(self) -> bool:
        """Has the leader of this process ended or started again?"""
        leader = self._leader()
        return not self._launcher.leads and (leader is None or leader.generation != self._generation)

    async def _live_once(self) -> Failure | None:
        """Start it and watch it to its end; None when it was ended on purpose."""
        loop = asyncio.get_running_loop()
        self._starts.append(loop.time())
        leader = self._leader()
        self._generation = leader.generation if leader else self._generation + 1
        self._ordered = None
        self._progress, self._ready_seconds, self._restart_in = None, None, None
        self._set("starting")

        def on_line(line: str) -> None:
            # Called in the log's thread, which a stuck process may keep alive beyond the loop.
            progress = self._engine.progress(line)
            if progress is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._show, progress)

        try:
            # In a thread: a program on a slow file system must not stop the heartbeats.
            running = await asyncio.to_thread(self._launcher.launch, self._generation, leader, on_line)
        except HpcserveError as error:
            again = isinstance(error, NodeGone)
            return Failure(cause="launch", message=error.message, hint=error.hint or "", retry=again)
        self._running = running
        self._changed()
        try:
            failure = await self._watch(running)
        finally:
            crashed = running.exited()
            stopping = self._stopping.is_set()
            status = await running.end(lambda: self._deadline if stopping else 0.0)
            self._running = None
            self._ended(running.pid)
        if self._stopping.is_set() or (failure is None and not crashed):
            return None
        return failure or self._engine.diagnose(running.pump.tail(), status if crashed else None)

    async def _watch(self, running: RunningEngine) -> Failure | None:
        """Until it exits or is to end: None. A failure when it hangs, is late, or is to start again."""
        clock = asyncio.get_running_loop().time
        started = last_good = clock()
        ready = False
        while not running.exited() and not self._stopping.is_set():
            if self._ordered is not None:
                return self._ordered
            if self._left_behind():
                return None
            if running.url is None:
                # No API here: another process of the replica speaks for this one.
                if self._state != "loading":
                    self._failure = None
                    self._set("loading")
                await self._nap(self._patience.probe)
                continue
            if await self._probe(running.url):
                last_good = clock()
                if not ready:
                    ready = True
                    self._in_a_row = 0
                    self._failure = None
                    self._ready_seconds = round(last_good - started, 3)
                    self._set("ready")
            elif ready and clock() - last_good > self._patience.hang:
                return Failure(
                    cause="hang",
                    message=f"no answer on {self._engine.health_path} for {self._patience.hang:g} s",
                    hint="its log's last lines may say why; it was killed and starts again",
                    retry=True,
                )
            elif not ready and clock() - started > self._patience.load:
                return Failure(
                    cause="load-timeout",
                    message=f"not ready after {self._patience.load:g} s",
                    hint="raise `ready_timeout` in model.yaml if the model is large or the storage slow",
                    retry=True,
                )
            await self._nap(self._patience.probe_ready if ready else self._patience.probe)
        return None

    async def _probe(self, url: str) -> bool:
        """One health check, cut short when the process is to stop."""
        probe = asyncio.ensure_future(self._healthy(url + self._engine.health_path))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((probe, stop), return_when=asyncio.FIRST_COMPLETED)
            return bool(probe.done() and probe.result())
        finally:
            probe.cancel()
            stop.cancel()

    async def _may_start_again(self, failure: Failure) -> bool:
        """Wait for the back-off. False when starting again is pointless."""
        self._failure = failure
        now = asyncio.get_running_loop().time()
        while self._starts and now - self._starts[0] > self._patience.window:
            self._starts.popleft()
        if not failure.retry or len(self._starts) >= self._patience.starts:
            self._set("failed")
            return False
        self._restart_in = min(self._patience.most_back_off, self._patience.back_off * 2.0**self._in_a_row)
        self._in_a_row += 1
        self._set("backoff")
        if not self._launcher.leads:
            # Its leader has the back-off for the whole replica.
            return True
        await self._nap(self._restart_in)
        return True

    async def _nap(self, seconds: float) -> None:
        """Sleep, but wake up to stop, and soon after the process has exited."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self._stopping.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or (self._running is not None and self._running.exited()):
                return
            try:
                async with asyncio.timeout(min(left, 0.1)):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    def _show(self, progress: str) -> None:
        if progress != self._progress and self._state in ("starting", "loading"):
            self._progress = progress
            self._set("loading")

    def _set(self, state: State) -> None:
        if state != self._state or state in ("starting", "loading"):
            self._state = state
            self._changed()
