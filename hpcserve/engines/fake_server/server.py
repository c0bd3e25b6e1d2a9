"""The life of a fake engine's process: bind, load, serve, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import uvloop

from ...http.server import Server, bind, serve
from .app import VERSION, App, Engine
from .context_app import ContextApp
from .failures import START_FAILURES, Failures
from .flags import Flags, parse
from .kv_cache import BlockPool, Event
from .metrics import Metrics
from .puller import Puller
from .rooms import RoomPuller, Rooms
from .scheduler import Scheduler
from .sglang_app import SGLangApp
from .side_channel import SideChannel

if TYPE_CHECKING:
    from .kv_events import KVEventPublisher

log = logging.getLogger(__name__)

_SHARDS = 4


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    _log_like_vllm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(flags))


def _log_like_vllm() -> None:
    prefix = f"(APIServer pid={os.getpid()})"
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format=f"{prefix} %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )


class Shutdown:
    """Set by the first SIGTERM or SIGINT; the second ends the process."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: int) -> None:
        if self.asked.is_set():
            os._exit(128 + number)
        log.info("Received %s", signal.Signals(number).name)
        self.asked.set()


async def _run(flags: Flags) -> int:
    shutdown = Shutdown()
    failures = Failures()
    crashes = False
    for command in flags.failures:
        if command["mode"] == "crash":
            crashes = True
        else:
            failures.apply(command)
    log.info("vLLM API server version %s (fake)", VERSION)
    log.info("non-default args: %s", " ".join(sys.argv[1:]))
    if failures.start_failure is not None:
        return _fails_to_start(START_FAILURES[failures.start_failure].format(model=flags.model))
    try:
        parts = await _Parts.open(flags, failures)
    except OSError as error:
        return _fails_to_start(f"{type(error).__name__}: {error}")
    try:
        if not await _loaded(flags, failures, shutdown):
            return 0
        server = await parts.serve()
        if crashes:
            failures.apply({"mode": "crash"})
        await shutdown.asked.wait()
        await _drain(flags, parts, server)
    finally:
        parts.close()
    return 0


def _fails_to_start(line: str) -> int:
    print("Traceback (most recent call last):", line, sep="\n", file=sys.stderr, flush=True)
    log.error("Engine core initialization failed. See root cause above.")
    return 1


class _Parts:
    """Everything that holds a socket or a task."""

    @classmethod
    async def open(cls, flags: Flags, failures: Failures) -> _Parts:
        """Bind all ports before the model loads, as vLLM does. Raises OSError."""
        parts = cls(flags, failures)
        try:
            for rank in parts.ranks:
                if rank.side_channel is not None:
                    await rank.side_channel.start()
        except OSError:
            parts.close()
            raise
        return parts

    def __init__(self, flags: Flags, failures: Failures) -> None:
        self._flags = flags
        self._sock = bind(flags.host, flags.port)
        self.ranks: list[_Rank] = []
        try:
            for rank in range(flags.data_parallel_size):
                self.ranks.append(_Rank(flags, failures, rank))
        except OSError:
            self.close()
            raise

    async def serve(self) -> Server:
        """Answer requests from now on."""
        for rank in self.ranks:
            rank.start()
        server = await serve(self._app().handle, sock=self._sock, cancel_on_disconnect=True)
        log.info("Starting vLLM server on http://%s:%d", self._flags.host, server.port)
        _say(f"INFO:     Started server process [{os.getpid()}]")
        _say("INFO:     Waiting for application startup.")
        _say("INFO:     Application startup complete.")
        return server

    def _app(self) -> App:
        first = self.ranks[0]
        match self._flags.dialect:
            case "sglang":
                channel = first.side_channel
                return SGLangApp(first.engine, channel if isinstance(channel, Rooms) else None)
            case "tensorrt-llm":
                return ContextApp(first.engine, first.side_channel)
            case _:
                return App(*(rank.engine for rank in self.ranks))

    @property
    def unfinished(self) -> int:
        return sum(rank.engine.scheduler.unfinished for rank in self.ranks)

    def abort_all(self) -> None:
        for rank in self.ranks:
            rank.engine.scheduler.abort_all()

    def drain(self) -> None:
        for rank in self.ranks:
            rank.engine.draining = True

    async def idle(self) -> None:
        """Wait for the last request, and on a prefill engine for the last pull, as vLLM's drain does."""
        for rank in self.ranks:
            await rank.engine.scheduler.idle()
            if rank.side_channel is not None:
                await rank.side_channel.idle()

    def close(self) -> None:
        self._sock.close()
        for rank in self.ranks:
            rank.close()


class _Rank:
    """One data-parallel rank: an engine with a cache, metrics and sockets of its own."""

    def __init__(self, flags: Flags, failures: Failures, rank: int) -> None:
        """Raises OSError when an address is taken."""
        self.events = _publisher(flags, rank)
        queue: list[Event] = []
        pool = BlockPool(flags.kv_blocks, flags.block_size, queue.append if self.events else None)
        metrics = Metrics(
            flags.served_name,
            flags.max_model_len,
            transfers=flags.disaggregated,
            blocks=flags.kv_blocks,
            block_size=flags.block_size,
            rank=rank,
        )
        prefill = flags.role == "prefill"
        self.side_channel: SideChannel | None = None
        self.puller: Puller | None = None
        if flags.dialect == "sglang":
            self.side_channel = Rooms(flags, pool, metrics, failures, self._blocks_freed) if prefill else None
            self.puller = RoomPuller(flags, metrics, failures) if flags.role == "decode" else None
        else:
            if prefill:
                self.side_channel = SideChannel(flags, pool, metrics, failures, self._blocks_freed, rank)
            self.puller = Puller(flags, metrics, failures) if flags.role == "decode" else None
        self.scheduler = Scheduler(
            flags,
            pool,
            metrics,
            failures,
            producer=self.side_channel,
            consumer=self.puller,
            publish=self.events.publish if self.events else None,
            events=queue,
        )
        self.engine = Engine(
            flags=flags,
            pool=pool,
            metrics=metrics,
            failures=failures,
            scheduler=self.scheduler,
            puller=self.puller,
            events=self.events,
        )
        self._stepping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._stepping = asyncio.get_running_loop().create_task(self.scheduler.run())
        self._stepping.add_done_callback(_engine_died)
        if self.events is not None:
            self.events.start()
        if self.side_channel is not None:
            log.info("Initializing NIXL Scheduler %s", self.side_channel.engine_id)

    def close(self) -> None:
        for part in (self.puller, self.side_channel, self.events):
            if part is not None:
                part.close()
        if self._stepping is not None:
            self._stepping.cancel()

    def _blocks_freed(self) -> None:
        self.scheduler.wake()


def _publisher(flags: Flags, rank: int) -> KVEventPublisher | None:
    """Raises OSError when an address is taken."""
    if flags.kv_events is None:
        return None
    # ZMQ is a fifth of this process's start and memory, and not every engine publishes.
    from .kv_events import KVEventPublisher

    return KVEventPublisher(flags.kv_events, flags.kv_replay, rank=rank)


def _engine_died(task: asyncio.Task[None]) -> None:
    """A bug in the scheduler must not look like a slow engine."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("EngineCore encountered a fatal error.", exc_info=error)
        os._exit(1)


async def _loaded(flags: Flags, failures: Failures, shutdown: Shutdown) -> bool:
    """Pretend to load a model; False when asked to stop meanwhile."""
    log.info("Starting to load model %s...", flags.model)
    for shard in range(_SHARDS):
        _say_loaded(shard)
        stuck = failures.never_ready and shard == _SHARDS // 2
        try:
            await asyncio.wait_for(shutdown.asked.wait(), None if stuck else flags.start_delay / _SHARDS)
        except TimeoutError:
            continue
        return False
    _say_loaded(_SHARDS)
    log.info("Model loading took 0.0 GiB memory and %.6f seconds", flags.start_delay)
    log.info("GPU KV cache size: %s tokens", f"{flags.kv_blocks * flags.block_size:,}")
    return True


def _say_loaded(shards: int) -> None:
    percent = 100 * shards // _SHARDS
    _say(f"Loading safetensors checkpoint shards: {percent:3d}% Completed | {shards}/{_SHARDS}")


async def _drain(flags: Flags, parts: _Parts, server: Server) -> None:
    """Finish what runs for up to the shutdown timeout, abort the rest, close."""
    parts.drain()
    _say("INFO:     Shutting down")
    if flags.shutdown_timeout > 0:
        # Not finishing in time is no error: the rest is aborted.
        with suppress(TimeoutError):
            await asyncio.wait_for(parts.idle(), flags.shutdown_timeout)
    if parts.unfinished:
        log.info("Aborting %d unfinished requests", parts.unfinished)
        parts.abort_all()
    await server.close(grace=0.5)
    _say("INFO:     Application shutdown complete.")


def _say(line: str) -> None:
    """A line of uvicorn or tqdm, which don't log in vLLM's format."""
    print(f"(APIServer pid={os.getpid()}) {line}", flush=True)
