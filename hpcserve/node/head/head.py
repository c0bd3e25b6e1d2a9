"""The head: controller, router and the life of the run, on the node of rank 0."""

from __future__ import annotations

import asyncio
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec

from ... import engines
from ...errors import HpcserveError, JobError
from ...http.server import serve
from ..agent.transfer import degraded_anywhere
from ..calls import CallFailed, Calls
from ..console import say, warn
from ..discovery.facts import Roster, wait_for_roster
from ..inputs import Inputs, read_secret
from ..journal import Journal, note_job_started, open_journal, walltime_end
from ..ports import PortRange, ephemeral_range, listen
from ..staging.staged import staging_seconds
from .batch_api_process import BatchApiProcess
from .batch_process import BatchProcess
from .controller import Controller, Desk
from .ending import KILL_MARGIN, Ending
from .kv_proof import Prover
from .noticeboard import Noticeboard
from .proving import Proving
from .readiness import Readiness
from .registry import Heartbeat, News, Registry
from .router_process import RouterProcess

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1: what the job script sends where srun is in between, which would kill for SIGTERM."""
_TICK = 0.25
_ROUTER_WAIT = 60.0
_AGENT_END = KILL_MARGIN - 1.0
"""Seconds the agents get beyond their engines' grace; the job ends them then."""
_HOPELESS = 60.0
"""Seconds in which a lost agent may come back when nothing else is left."""


def run_head(inputs: Inputs) -> int:
    """Serve until the run is to end; 0, or the status of the batch that the run was for.

    Raises the error that made it fail, after it was written down.
    """
    with open_journal(inputs) as journal:
        try:
            status = asyncio.run(_main(inputs, journal))
        except HpcserveError as error:
            journal.write("failed", message=error.message, hint=error.hint, exit_code=error.exit_code)
            raise
        except Exception as error:
            told = traceback.format_exception_only(error)[-1].strip()
            journal.write(
                "failed",
                message=f"the head process crashed: {told}",
                hint="this is a bug in hpcserve; logs/head.log has the traceback",
                exit_code=1,
            )
            raise
    return status


async def _main(inputs: Inputs, journal: Journal) -> int:
    began = note_job_started(inputs, journal)
    roster = await wait_for_roster(inputs.run, inputs.attempt)
    # Slurm may have been too busy to say it when the rendezvous asked.
    end = began["end_time"] if began["end_time"] is not None else walltime_end(inputs)
    head = Head(inputs, roster, journal, started=began["t"], end_time=end)
    await head.run()
    return 0 if head.batch is None else head.batch.status


class Head:
    def __init__(
        self, inputs: Inputs, roster: Roster, journal: Journal, *, started: float, end_time: float | None
    ) -> None:
        plan = inputs.plan
        self._inputs = inputs
        self._plan = plan
        self._roster = roster
        self._journal = journal
        self._address = roster.ranks[0].address
        self._board = Noticeboard(inputs, roster, started=started, end_time=end_time)
        self._hopeless_since: float | None = None
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._registry = Registry(plan, roster.ranks)
        self._ending = Ending(plan, end_time, inputs.run.stop)
        self._calls = Calls(inputs.job_key)
        self._tasks: set[asyncio.Task[None]] = set()
        self.batch = (
            BatchProcess(plan.batch, inputs.run, journal, self._ending) if plan.batch is not None else None
        )
        self._batches = self.batch or BatchApiProcess(plan, inputs.run, self._tell, self._ending)
        self._router = RouterProcess(
            config=self._router_config(),
            config_path=inputs.run.path / "router.json",
            log=inputs.run.logs / "router.log",
            on_listening=self._on_listening,
            on_suspect=self._on_suspect,
            on_death=self._on_router_death,
            ending=self._ending.asked.is_set,
        )
        self._proving = Proving(
            plan=plan,
            roster=roster,
            registry=self._registry,
            prover=Prover(
                engines.of(plan.model),
                self._calls,
                served_name=plan.served_name,
                max_model_len=plan.model.max_model_len,
            ),
            tell=self._tell,
        )

    def _router_config(self) -> dict[str, Any]:
        router, ports, run = self._plan.model.router, self._plan.site.ports, self._inputs.run
        return {
            "host": self._address,
            "port": router.port or [ports.low, ports.high],
            "api_key_file": str(run.api_key) if router.auth else None,
            "job_key_file": str(run.job_key),
            "engine": engines.of(self._plan.model).name,
            "served_name": self._plan.served_name,
            "policy": router.policy,
            "processes": router.processes,
            "queue_seconds": router.queue_seconds,
            "max_body": router.max_body_mib << 20,
            "first_byte_timeout": router.first_byte_timeout,
            "retries": router.retries,
            # Both belong to the runs directory, and outlive this run.
            "keys": str(run.keys) if router.auth else None,
            "usage": {
                "directory": str(run.usage),
                "run": run.path.name,
                "gpus": self._plan.gpus,
                "started": time.time(),
            },
            "kv_lease": self._plan.model.kv_lease,
            "batch_api": str(run.batch_api) if self._plan.batch is None else None,
        }

    # The life of a run.

    async def run(self) -> None:
        """Raises the error that ended the run, after everything was stopped."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        ports = self._plan.site.ports
        wanted = PortRange(
            low=ports.low,
            high=ports.high,
            seed=f"controller {self._inputs.attempt}",
            ephemeral=ephemeral_range(),
        )
        desk = Desk(
            heartbeat=self._heartbeat,
            kv_news=self._kv_news,
            status=self._status,
            drain=self._ending.drain,
            stop=self._ending.stop,
        )
        sock = listen(wanted, self._address)
        sock.setblocking(False)
        server = await serve(Controller(self._inputs.job_key, desk).handle, sock=sock)
        try:
            self._board.publish_head(self._address, server.port)
            await self._serve()
        finally:
            await self._calls.close()
            await server.close()
            # Python gives its own handlers back to the system on its way out; ignored ones stay ignored.
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # Not loop.add_signal_handler: it gives signals back to the system when the loop closes, and one
        # that comes in the last milliseconds would turn a clean end into a death by signal.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ending.on_signal, signal.Signals(number))

    async def _serve(self) -> None:
        background = [
            asyncio.create_task(self._router.run()),
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._ending.watch()),
        ]
        life = asyncio.create_task(self._live())
        stop = asyncio.create_task(self._ending.asked.wait())
        error: BaseException | None = None
        try:
            done, _ = await asyncio.wait({life, stop, *background}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is not None:
                    error = task.exception()
            if error is None:
                await self._drain()
        finally:
            self._board.state = "failed" if error else "stopping"
            life.cancel()
            # Whatever it ends with must not keep the agents from being stopped.
            await asyncio.gather(life, return_exceptions=True)
            await self._batches.close()
            await self._stop_agents()
            await self._router.close()
            for task in (*background, stop, *self._tasks):
                task.cancel()
            await asyncio.gather(*background, stop, *self._tasks, return_exceptions=True)
        if error is not None:
            raise error
        if self.batch is not None:
            self.batch.check()
        self._journal.write("stopped", reason=self._ending.reason)
        say(f"stopped: {self._ending.reason}")

    async def _live(self) -> None:
        """Bring the run to READY, then keep its replicas in rotation. Ends only by an error."""
        for found in degraded_anywhere(self._plan, self._roster.ranks):
            self._tell([("warning", {"message": found.message, "hint": found.hint})])
        if self._plan.site.scheduler == "slurm" and self._ending.end_time is None:
            self._tell([("warning", {
                "message": "neither squeue nor scontrol says when this job ends, so it can't drain before",
                "hint": "make Slurm's commands available on the nodes (in the container, too)",
            })])  # fmt: skip
        readiness = Readiness(self._plan, self._registry, self._next_change)
        await readiness.agents()
        self._board.mark("agents")
        await readiness.engines(await staging_seconds(self._inputs))
        self._board.mark("engines")
        await self._prove_first()
        self._board.mark("kv-path" if self._plan.disaggregated else "proven")
        self._board.state = "ready"
        self._publish()
        await self._first_token()
        self._journal.write("ready", **self._board.publish_ready())
        self._batches.begin()
        while True:
            await self._proving.round()
            await self._pause(_TICK)

    async def _prove_first(self) -> None:
        """Until requests can be answered the way the plan says; what was lost meanwhile may come back."""
        clock = asyncio.get_running_loop().time
        needed = {"prefill", "decode"} if self._plan.disaggregated else {"aggregated"}
        began = hoped = clock()
        while True:
            errors = await self._proving.round()
            missing = needed - {worker.role for worker in self._registry.workers()}
            if not missing:
                return
            if errors:
                raise errors[0]
            if missing <= self._registry.roles_to_come():
                hoped = clock()
            if clock() - hoped > _HOPELESS or clock() - began > self._plan.ready_timeout + _HOPELESS:
                raise JobError(
                    f"no {' and no '.join(sorted(missing))} replica is left that can answer",
                    hint="`hpcserve logs` shows why; warnings above name lost nodes and dead engines",
                )
            await self._pause(_TICK)

    async def _first_token(self) -> None:
        deadline = asyncio.get_running_loop().time() + _ROUTER_WAIT
        while self._board.endpoint is None or not self._router.knows:
            if asyncio.get_running_loop().time() > deadline:
                raise JobError(
                    f"the router did not start within {_ROUTER_WAIT:g} s", hint="logs/router.log says why"
                )
            await self._pause(0.1)
        key = read_secret(self._inputs.run.api_key) if self._plan.model.router.auth else ""
        calls = Calls(key)
        body = {"model": self._plan.served_name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        began = time.monotonic()
        try:
            await calls.json("POST", f"{self._board.url}/completions", body, seconds=120.0)
        except CallFailed as error:
            raise JobError(
                f"the engines answer, but not through the router: {error}", hint="logs/router.log says more"
            ) from error
        finally:
            await calls.close()
        self._board.mark("first-token")
        self._journal.write("first-token", seconds=round(time.monotonic() - began, 3))

    async def _drain(self) -> None:
        ending, board = self._ending, self._board
        running = board.state == "ready"
        board.state, board.reason = "draining", ending.reason
        self._journal.write("draining", reason=ending.reason, until=round(ending.until(), 3))
        say(f"draining: {ending.reason}")
        self._publish()
        seen = self._router.reports
        while self.batch is not None and self.batch.busy and ending.draining():
            # It hears from the router that nothing more is taken, and writes down what it has.
            await self._pause(0.1)
        while running and ending.draining() and self._router.alive:
            # Two reports later the counts are surely newer than the last accepted request.
            if self._router.reports >= seen + 2 and self._router.stats.in_flight == 0:
                return
            await self._pause(0.1)

    async def _stop_agents(self) -> None:
        self._board.withdraw()
        self._publish()
        self._stop_grace = self._ending.grace()
        deadline = asyncio.get_running_loop().time() + self._stop_grace + _AGENT_END
        while not self._registry.over() and asyncio.get_running_loop().time() < deadline:
            if self._ending.forced:
                self._stop_grace = 0.0
            await self._pause(0.1)
        # Their last report came over a connection that must not be cut before they have read the answer.
        await asyncio.sleep(0.1)

    _stop_grace: float | None = None
    """Seconds for the engines to end; None while they are to run."""

    # What comes in.

    def _heartbeat(self, beat: Heartbeat) -> Mapping[str, Any]:
        self._tell(self._registry.heartbeat(beat, asyncio.get_running_loop().time()))
        order: dict[str, Any] = {"command": "run", "grace": 0.0}
        if self._stop_grace is not None:
            order = {"command": "stop", "grace": self._stop_grace}
        elif self._board.state == "draining":
            order["command"] = "drain"
        return {
            **order,
            **self._registry.orders(beat.rank),
            "kv_round": self._router.kv_round,
        }

    def _kv_news(self, worker: str, message: msgspec.Raw) -> None:
        self._registry.replica_of(worker)
        self._router.tell_kv(worker, message)

    def _on_listening(self, host: str, port: int) -> None:
        board = self._board
        moved = board.endpoint is not None and board.endpoint != (host, port)
        board.endpoint = (host, port)
        if moved:
            message = f"the router came back on another port: {board.url}"
            self._tell([("warning", {"message": message, "hint": "clients must use the new URL"})])
            board.publish_move()

    def _on_suspect(self, worker: str, reason: str) -> None:
        task = asyncio.create_task(self._examine(worker, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _examine(self, worker: str, reason: str) -> None:
        """The router had trouble with a worker: is the engine itself silent?"""
        known = next((each for each in self._registry.workers() if each.name == worker), None)
        if known is None:
            return
        path = engines.of(self._plan.model).health_path
        if await self._calls.healthy(known.url + path, seconds=2.0):
            return
        replica = self._registry.replicas[known.replica]
        if replica.generation == replica.proven == known.generation:
            self._tell(self._registry.suspect(replica.name, f"it does not answer: {reason}"))

    def _on_router_death(self, status: int) -> None:
        self._tell([("warning", {
            "message": f"the router ended with status {status} and is started again",
            "hint": "requests that were running are lost; logs/router.log says why",
        })])  # fmt: skip

    async def _watch(self) -> None:
        """Notice silent agents; end a run in which nothing can come back."""
        loop = asyncio.get_running_loop()
        looked = loop.time()
        while True:
            # On a machine whose cores are all computing, this process may be the one that was silent.
            stalled = loop.time() - looked - _TICK
            if stalled > _TICK:
                self._registry.excuse(stalled)
            looked = loop.time()
            self._tell(self._registry.expire(looked))
            if self._board.state == "ready":
                self._check_hope()
            await asyncio.sleep(_TICK)

    def _check_hope(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._registry.hopeless():
            self._hopeless_since = None
            return
        self._hopeless_since = self._hopeless_since or now
        if now - self._hopeless_since > _HOPELESS:
            reasons = {self._registry.why_out(replica) for replica in self._registry.replicas.values()}
            raise JobError(
                f"every replica is lost or given up: {'; '.join(sorted(reasons)[:4])}",
                hint="`hpcserve logs` shows the engines' last lines; then launch again",
            )

    # What goes out.

    def _tell(self, news: Sequence[News]) -> None:
        for name, fields in news:
            self._journal.write(name, **fields)
            _show(name, fields)
        self._changed.set()
        self._changed = asyncio.Event()
        self._publish()

    _published: Mapping[str, Any] | None = None

    def _publish(self) -> None:
        table = self._board.table(self._registry)
        if table != self._published:
            self._published = table
            self._router.tell(table)

    def _status(self) -> Mapping[str, Any]:
        return self._board.status(self._registry, self._router.stats)

    def _next_change(self) -> asyncio.Event:
        return self._changed

    async def _pause(self, seconds: float) -> None:
        """Until something changes, at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


def _show(name: str, fields: Mapping[str, Any]) -> None:
    """The events worth a line in head.log."""
    match name:
        case "warning":
            warn(str(fields["message"]), fields.get("hint"))
        case "engine-died":
            again = f" (starts again in {fields['restart_in']:g} s)" if fields.get("restart_in") else ""
            hint = f"\nhint: {fields['hint']}" if fields.get("hint") else ""
            say(f"engine-died: {fields['replica']}: {fields['message']}{again}{hint}")
        case "worker-in":
            say(f"worker-in: {fields['replica']}")
        case "worker-out":
            say(f"worker-out: {fields['replica']}: {fields['reason']}")
        case "kv-path" if not fields["ok"]:
            say(f"kv-path: {fields['prefill']} to {fields['decode']} failed: {fields['error']}")
