"""Starts one process of a replica: ports, command, environment, process group."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...engines.base import Engine, EngineContext
from ...engines.kv_events.endpoints import EventEndpoint, too_deep
from ...errors import EngineError
from ...plan.plan import Plan, ReplicaPlan
from ...rundir.atomic import storage_error, write_text
from ..console import warn
from ..discovery.addresses import in_url
from ..discovery.facts import RankFacts, Roster
from ..ports import HeldPorts, PortRange, ephemeral_range, hold
from ..process import signal_group
from .environment import engine_environment
from .keeper import Keeper
from .kv_disk import DiskTier
from .log_pump import LogPump
from .transfer import transfer_devices

_GROUP_END = 5.0
"""Seconds the kernel may take to clear a killed process group."""


class RunningEngine:
    """A started engine process, its process group and its log."""

    def __init__(
        self, process: subprocess.Popen[bytes], *, url: str | None, ports: Mapping[str, int], pump: LogPump
    ) -> None:
        self.process = process
        self.url = url
        """None for a process without an API, as on most replicas' second and later nodes."""
        self.ports = ports
        self.pump = pump

    @property
    def pid(self) -> int:
        return self.process.pid

    def exited(self) -> bool:
        return self.process.poll() is not None

    async def end(self, deadline: Callable[[], float]) -> int:
        """SIGTERM, and at `deadline` (loop time, may move) SIGKILL for the group. Returns the exit status."""
        clock = asyncio.get_running_loop().time
        if deadline() > clock() and not self.exited():
            # Only the first process: an engine ends its own workers in the right order.
            self.process.send_signal(signal.SIGTERM)
            await self._wait(deadline)
        last = clock() + _GROUP_END
        while signal_group(self.pid, signal.SIGKILL) and clock() < last:
            self.exited()
            await asyncio.sleep(0.02)
        await self._wait(lambda: last)
        await asyncio.to_thread(self.pump.finish, 2.0)
        return self.process.returncode if self.process.returncode is not None else -signal.SIGKILL

    async def _wait(self, deadline: Callable[[], float]) -> None:
        while True:
            if self.exited() or asyncio.get_running_loop().time() >= deadline():
                return
            await asyncio.sleep(0.02)


_NICE = 5
"""How much nicer engines on the CPU are than the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """The running head process of a replica over several nodes."""

    generation: int
    ports: Mapping[str, int]
    ready: bool = False
    """Does the replica answer?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLauncher:
    """Everything about one process of a replica that stays the same over its restarts."""

    plan: Plan
    replica: ReplicaPlan
    roster: Roster
    rank: int
    engine: Engine
    key: str
    environ: Mapping[str, str]
    cpus: tuple[tuple[int, ...], ...]
    scratch: Path
    log: Path
    keeper: Keeper
    find_leader: Callable[[str], Leader | None]
    """The head process of a replica, by the replica's name; None while it does not run."""

    @property
    def facts(self) -> RankFacts:
        return self.roster.ranks[self.rank]

    @property
    def node(self) -> int:
        """This process's place in the replica; 0 is its head."""
        return self.replica.nodes.index(self.rank)

    @property
    def leads(self) -> bool:
        """Is this the process that the replica's others follow?"""
        return self.node == 0

    def leader(self) -> Leader | None:
        """The head process this one belongs to; None while it does not run."""
        return self.find_leader(self.replica.name)

    def launch(self, generation: int, leader: Leader | None, on_line: Callable[[str], None]) -> RunningEngine:
        """Start the process on new ports. Raises JobError, or StorageError, when it can't be started at all.

        Blocks while the program is read from disk: call it in a thread.
        """
        held: dict[str, HeldPorts] = {}
        try:
            for name, count in self.engine.ports(self.replica).items():
                if self.node == 0 or name not in self._shared():
                    held[name] = hold(self._range(name, generation), self.facts.address, count)
            ports = {name: block.first for name, block in held.items()}
            if self.node > 0:
                ports = {**(leader.ports if leader else {}), **ports}
            command = self.engine.command(self._context(ports))
        finally:
            # Only now: until the command is complete, nobody else may get one of these ports.
            for block in held.values():
                block.release()
        try:
            self.scratch.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, "make a node-local directory") from error
        for name, text in command.files.items():
            write_text(self.scratch / name, text, mode=0o600)
        environment = engine_environment(
            self.environ,
            command.env,
            key_variable=self.engine.key_variable,
            key=self.key,
            scratch=str(self.scratch),
        )
        has_api = self.node in self.engine.api_nodes(self.replica)
        url = f"http://{in_url(self.facts.address)}:{ports['http']}" if has_api else None
        return self._spawn(command.argv, environment, url, ports, on_line)

    def _spawn(
        self,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        url: str | None,
        ports: Mapping[str, int],
        on_line: Callable[[str], None],
    ) -> RunningEngine:
        try:
            process = subprocess.Popen(
                argv,
                env=dict(environment),
                cwd=self.scratch,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                # A group of its own: it is ended as a whole, and signals to the agent pass it by.
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(
                f"{self.replica.name}: can't start {argv[0]}: {error.strerror}",
                hint="is the engine installed on this node? `setup` of the site config says how",
            ) from error
        self.keeper.add(process.pid)
        if self.plan.device == "cpu":
            make_nicer(process.pid)
        assert process.stdout is not None
        return RunningEngine(process, url=url, ports=ports, pump=LogPump(process.stdout, self.log, on_line))

    def kv_event_sources(self) -> dict[str, tuple[EventEndpoint, ...]]:
        """Where this process's KV events are read, by the worker they are about; {} if it publishes none."""
        if too_deep(str(self.scratch)):
            warn(
                f"{self.replica.name} publishes no KV events: {self.scratch} is too long a path for sockets",
                "set `storage.node_local` of the site to a shorter one; until then, caches are predicted",
            )
        endpoints = self.engine.kv_event_endpoints(self._context({}))
        if self.engine.routed_ranks(self.replica):
            return {self.replica.rank_name(each.rank): (each,) for each in endpoints}
        return {self.replica.name: endpoints} if endpoints else {}

    def disk_tier(self) -> DiskTier | None:
        """Where this process keeps KV blocks on the node's disk."""
        found = self.engine.disk_tier(self._context({}))
        return None if found is None else DiskTier(directory=found[0], size=found[1])

    def _shared(self) -> frozenset[str]:
        return self.engine.shared_ports

    def _range(self, name: str, generation: int) -> PortRange:
        ports = self.plan.site.ports
        # Each start looks elsewhere: the ports of the last one may still be in TIME_WAIT.
        # The log's path tells runs apart that have no job id, or would meet on one machine: an engine
        # that another run starts on a port just released would answer this one's health checks.
        seed = f"{self.log} {self.roster.attempt} {self.rank} {self.replica.name} {name} {generation}"
        return PortRange(low=ports.low, high=ports.high, seed=seed, ephemeral=ephemeral_range())

    def _context(self, ports: Mapping[str, int]) -> EngineContext:
        return EngineContext(
            plan=self.plan,
            replica=self.replica,
            node=self.node,
            address=self.facts.address,
            head_address=self.roster.ranks[self.replica.nodes[0]].address,
            ports={name: str(port) for name, port in ports.items()},
            model_path=self.plan.model.model,
            cpus=self.cpus,
            fabric_env=transfer_devices(self.plan, self.facts, self.replica).env,
            python=sys.executable,
            scratch=str(self.scratch),
            gpu_names=tuple(gpu.visible for gpu in self.facts.gpus),
        )


def make_nicer(process: int) -> None:
    """Let a fresh child compute only where agent, controller and router leave time.

    On the CPU, engines take all cores there are, and heartbeats and streams of tokens would wait
    behind them. What the child starts later inherits it.
    """
    os.setpriority(os.PRIO_PROCESS, process, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICE))
    # Where the kernel groups tasks by session, nice values count inside a session only, and the
    # session as a whole has one of its own. Not everywhere, and best effort where it is.
    with suppress(OSError):
        Path(f"/proc/{process}/autogroup").write_text(str(_NICE))
