"""Starts one process of a replica: ports, command, environment, process group."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...engines.base import Engine, EngineCommand, EngineContext
from ...engines.kv_events.endpoints import EventEndpoint, too_deep
from ...errors import EngineError
from ...plan.plan import Plan, ReplicaPlan
from ...render.engine_step import srun_words
from ...rundir.atomic import storage_error, write_text
from ..console import warn
from ..discovery.addresses import in_url
from ..discovery.facts import RankFacts, Roster
from ..ports import HeldPorts, PortRange, ephemeral_range, hold
from ..rank import node_names
from .engine_container import contained_argv, contained_environment, engines_apart
from .environment import engine_environment, step_environment
from .keeper import Keeper
from .kv_disk import DiskTier
from .log_pump import LogPump
from .running_engine import RunningEngine
from .step import NodeGone, RunningStep, Step
from .transfer import transfer_devices

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
    model_path: str
    """The same on all nodes: `model`, or its staged copy."""
    engine: Engine
    key: str
    environ: Mapping[str, str]
    cpus: tuple[tuple[int, ...], ...]
    scratch: Path
    run_dir: Path
    log: Path
    keeper: Keeper
    expect_in_memory: Callable[[Sequence[str]], tuple[Path, ...]]
    """Told what a process is going to make in /dev/shm; the paths of that."""
    find_leader: Callable[[str], Leader | None]
    """The head process of a replica, by the replica's name; None while it does not run."""
    find_seats: Callable[[str], Mapping[int, str]]
    """Private directories for a replica on those of its further nodes that are there, by rank."""

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

    def may_start(self) -> bool:
        """Are all nodes there that the replica's step needs? Slurm would wait for one that is not."""
        if not self.engine.in_step(self.replica):
            return True
        return set(self.replica.nodes[1:]) <= set(self.find_seats(self.replica.name))

    def launch(self, generation: int, leader: Leader | None, on_line: Callable[[str], None]) -> RunningEngine:
        """Start the process on new ports. Raises JobError, or StorageError, when it can't be started at all.

        Blocks while the program is read from disk: call it in a thread.
        """
        memory = self.expect_in_memory(self.engine.shared_memory(self._context({}, generation)))
        held: dict[str, HeldPorts] = {}
        try:
            for name, count in self.engine.ports(self.replica).items():
                if self.node == 0 or name not in self._shared():
                    held[name] = hold(self._range(name, generation), self.facts.address, count)
            ports = {name: block.first for name, block in held.items()}
            if self.node > 0:
                ports = {**(leader.ports if leader else {}), **ports}
            command = self.engine.command(self._context(ports, generation))
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
        has_api = self.node in self.engine.api_nodes(self.replica)
        url = f"http://{in_url(self.facts.address)}:{ports['http']}" if has_api else None
        if self.engine.in_step(self.replica):
            return self._launch_step(command, url, ports, on_line)
        environment = engine_environment(
            self.environ,
            command.env,
            key_variable=self.engine.key_variable,
            key=self.key,
            scratch=str(self.scratch),
        )
        argv = command.argv
        if engines_apart(self.plan):
            argv = contained_argv(
                self.plan, self.run_dir, argv, scratch=str(self.scratch), environ=self.environ
            )
            environment = contained_environment(self.plan, environment, command.env, outside=self.environ)
        process, pump = self._spawn(argv, environment, on_line)
        return RunningEngine(process, url=url, ports=ports, pump=pump, memory=memory)

    def _launch_step(
        self,
        command: EngineCommand,
        url: str | None,
        ports: Mapping[str, int],
        on_line: Callable[[str], None],
    ) -> RunningEngine:
        """The replica as one MPI program on all its nodes. The key stays on this one."""
        assert self.engine.mpi_launcher is not None
        scratches = {self.rank: str(self.scratch), **self.find_seats(self.replica.name)}
        if not set(self.replica.nodes) <= set(scratches):
            raise NodeGone(
                f"{self.replica.name}: one of its nodes is gone", hint="it starts when that is back"
            )
        names = node_names(self.environ)
        variables = {}
        for place, rank in enumerate(self.replica.nodes):
            context = self._context(ports, place=place, scratch=scratches[rank])
            variables[names[rank]] = {"TMPDIR": scratches[rank], **self.engine.command(context).env}
        step = Step(
            launcher=self.engine.mpi_launcher,
            argv=command.argv,
            secrets={self.engine.key_variable: self.key},
            variables=variables,
            scratch=self.scratch,
            name=self.replica.name,
        )
        lifeline = step.prepare()
        try:
            words = srun_words(self.plan, self.replica, ",".join(variables))
            environment = step_environment(self.environ, step.environment(self.environ))
            process, pump = self._spawn((*words, *step.task()), environment, on_line)
        except BaseException:
            os.close(lifeline)
            raise
        return RunningStep(process, url=url, ports=ports, pump=pump, lifeline=lifeline)

    def _spawn(
        self, argv: tuple[str, ...], environment: Mapping[str, str], on_line: Callable[[str], None]
    ) -> tuple[subprocess.Popen[bytes], LogPump]:
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
        return process, LogPump(process.stdout, self.log, on_line)

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

    def _start(self, generation: int) -> str:
        """One name for all processes of the replica, and for no other run's or attempt's."""
        run = hashlib.sha256(f"{self.run_dir}\n{self.roster.attempt}".encode()).hexdigest()[:16]
        return f"{self.replica.name}-{generation}-{run}"

    def _context(
        self,
        ports: Mapping[str, int],
        generation: int = 0,
        *,
        place: int | None = None,
        scratch: str | None = None,
    ) -> EngineContext:
        """Of this node, or of another `place` of the replica that this node starts."""
        place = self.node if place is None else place
        facts = self.roster.ranks[self.replica.nodes[place]]
        devices = transfer_devices(self.plan, facts, self.replica, self.roster.ranks)
        return EngineContext(
            plan=self.plan,
            replica=self.replica,
            node=place,
            address=facts.address,
            head_address=self.roster.ranks[self.replica.nodes[0]].address,
            ports={name: str(port) for name, port in ports.items()},
            model_path=self.model_path,
            cpus=self.cpus,
            fabric_env=devices.env,
            kv_over_nvlink=devices.kv_over_nvlink,
            python=self.plan.site.container.python if engines_apart(self.plan) else sys.executable,
            scratch=scratch or str(self.scratch),
            run_dir=str(self.run_dir),
            start=self._start(generation),
            gpu_names=tuple(gpu.visible for gpu in facts.gpus),
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
