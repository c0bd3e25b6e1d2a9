"""Continuous batching: one task steps all sequences, and sleeps for as long as a step would take.

A step takes `itl_ms` (plus a share per sequence) if anything decodes, plus its prefill tokens over the
prefill rate, so that a long prompt delays its neighbours as it does in a real engine. An idle
scheduler waits on an event and costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

from .failures import Failures
from .flags import Flags
from .kv_cache import BlockPool, Event
from .metrics import Metrics
from .sequence import FinishReason, Output, Sequence, Work

_RESYNC = 0.05
"""Lag in seconds after which the simulated clock jumps to now: the machine is overloaded."""


class Producer(Protocol):
    """Where the blocks of a finished prefill wait for the decode side."""

    def hold(self, request_id: str, blocks: Items[int], ids: Items[int]) -> dict[str, Any]: ...


class Consumer(Protocol):
    """Where KV blocks of another engine come from."""

    def track(self, sequence: Sequence) -> None: ...
    def untrack(self, sequence: Sequence) -> None: ...
    async def load(self, sequence: Sequence, start: int, end: int) -> None: ...
    def notify(self, sequence: Sequence) -> None: ...


class LoadError(Exception):
    """KV blocks did not arrive."""

    def __init__(self, message: str, *, told: str | None = None) -> None:
        super().__init__(message)
        self.told = told
        """What the client is told; None: nothing."""


class Scheduler:
    """Runs sequences to their end. `submit` and `abort` may be called at any time."""

    def __init__(
        self,
        flags: Flags,
        pool: BlockPool,
        metrics: Metrics,
        failures: Failures,
        *,
        producer: Producer | None = None,
        consumer: Consumer | None = None,
        publish: Callable[[list[Event]], None] | None = None,
        events: list[Event] | None = None,
    ) -> None:
        self._flags = flags
        self._pool = pool
        self._metrics = metrics
        self._failures = failures
        self._producer = producer
        self._consumer = consumer
        self._publish = publish
        self._events = events if events is not None else []
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._loading: dict[Sequence, asyncio.Task[None]] = {}
        self._submitted = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.on_step: Callable[[Items[Work], float], None] | None = None
        """Is told of each step, and how many seconds it took."""
        metrics.watch(self)

    # What a scrape sees.

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting_for_capacity(self) -> int:
        return len(self._waiting)

    @property
    def loading(self) -> int:
        return len(self._loading)

    @property
    def loaded(self) -> int:
        return sum(1 for sequence in self._waiting if sequence.status == "loaded")

    @property
    def cache_usage(self) -> float:
        return self._pool.usage

    @property
    def unfinished(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._loading)

    def submit(self, sequence: Sequence) -> None:
        if sequence.loads_remotely and self._consumer is not None:
            self._consumer.track(sequence)
        sequence.number = self._submitted
        self._submitted += 1
        self._waiting.append(sequence)
        self._idle.clear()
        self.wake()

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence whose client has gone; nothing is reported to its listener."""
        if sequence.status == "finished":
            return
        if sequence.status == "running":
            self._running.remove(sequence)
        elif (task := self._loading.pop(sequence, None)) is not None:
            task.cancel()
        else:
            self._waiting.remove(sequence)
        if self._consumer is not None and sequence.loads_remotely:
            self._consumer.untrack(sequence)
            if sequence.status in ("waiting", "loading"):
                self._consumer.notify(sequence)
        self._end(sequence, "abort")

    def abort_all(self) -> None:
        """End every sequence with finish reason `abort`, telling its client."""
        for sequence in [*self._running, *self._waiting, *self._loading]:
            self.abort(sequence)
            sequence.listener.on_output(sequence, Output(text="", tokens=(), finish_reason="abort"))

    async def idle(self) -> None:
        """Wait until no sequence is left."""
        await self._idle.wait()

    def wake(self) -> None:
        """Something changed that may let a sequence run: a new one, or free blocks."""
        self._wake.set()

    async def run(self) -> None:
        """Step until cancelled."""
        clock = time.monotonic()
        while True:
            self._wake.clear()
            work = self._plan(time.monotonic())
            self._flush_events()
            if not work:
                await self._wake.wait()
                clock = time.monotonic()
                continue
            now = time.monotonic()
            took = self._duration(work)
            clock = (clock if clock > now - _RESYNC else now) + took
            await asyncio.sleep(max(0.0, clock - now))
            self._complete(work, time.monotonic())
            if self.on_step is not None:
                self.on_step(work, took)
            self._flush_events()

    # Planning a step.

    def _plan(self, now: float) -> list[Work]:
        budget = self._flags.max_num_batched_tokens
        work: list[Work] = []
        for sequence in list(self._running):
            if budget == 0 or sequence.status != "running":
                continue
            if self._failures.holds(sequence.number, sequence.output_length):
                continue
            if not self._grow(sequence):
                continue
            count = min(len(sequence.tokens) - sequence.computed, budget)
            budget -= count
            work.append(Work(sequence=sequence, count=count))
        # A sequence that was planned and then lost its blocks to an older one does not run.
        work = [item for item in work if item.sequence.status == "running"]
        while budget > 0 and self._waiting and len(self._running) < self._flags.max_num_seqs:
            sequence = self._waiting[0]
            if not self._admit(sequence, now):
                break
            self._waiting.popleft()
            if sequence.status != "running":
                continue
            self._running.append(sequence)
            count = min(len(sequence.tokens) - sequence.computed, budget)
            budget -= count
            work.append(Work(sequence=sequence, count=count))
        return work

    def _grow(self, sequence: Sequence) -> bool:
        """Room for the sequence's last token; takes it from the youngest sequences if it must."""
        while len(sequence.blocks) * self._pool.block_size < len(sequence.tokens):
            if self._pool.free:
                sequence.blocks += self._pool.allocate(1)
                continue
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.status = "waiting"
        sequence.loads_remotely = False
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)
        self._metrics.preemptions.inc()

    def _admit(self, sequence: Sequence, now: float) -> bool:
        """Take blocks for all of a waiting sequence's tokens; False while there are too few."""
        if sequence.status == "loaded":
            sequence.status = "running"
            return True
        size = self._pool.block_size
        # The last token is always computed, since its output is what the next one is sampled from.
        cached = self._pool.match(sequence.hash_blocks((len(sequence.tokens) - 1) // size, size))
        needed = -(-len(sequence.tokens) // size) - len(cached)
        if needed > self._pool.available(cached):
            return False
        self._pool.take(cached)
        sequence.blocks = [*cached, *self._pool.allocate(needed)]
        sequence.cached_blocks = len(cached)
        sequence.computed = len(cached) * size
        if sequence.preemptions == 0:
            sequence.local_hit = sequence.computed
            sequence.times.scheduled = now
            self._metrics.admitted(len(sequence.tokens), sequence.local_hit)
        if sequence.loads_remotely and self._consumer is not None:
            sequence.status = "loading"
            task = asyncio.get_running_loop().create_task(self._load(self._consumer, sequence))
            self._loading[sequence] = task
        else:
            sequence.status = "running"
        return True

    async def _load(self, consumer: Consumer, sequence: Sequence) -> None:
        start = sequence.computed
        end = min(sequence.prompt_length, int(sequence.kv_params.get("remote_num_tokens") or 0))
        try:
            await consumer.load(sequence, start, end)
        except LoadError as failure:
            if self._flags.kv_load_failure_policy == "fail":
                del self._loading[sequence]
                self._finish(sequence, Output(text="", tokens=(), finish_reason="error", error=failure.told))
                return
        else:
            sequence.external_hit = max(0, end - start)
            self._metrics.loaded(sequence.prompt_length - start, sequence.external_hit)
            self._advance(sequence, sequence.external_hit)
            sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        del self._loading[sequence]
        sequence.status = "loaded"
        self._waiting.appendleft(sequence)
        self.wake()

    def _duration(self, work: Items[Work]) -> float:
        decodes = sum(1 for item in work if item.decode)
        prefill = sum(item.count for item in work if not item.decode)
        seconds = prefill / self._flags.prefill_tokens_per_second
        if decodes:
            seconds += (self._flags.itl_ms + self._flags.itl_ms_per_seq * decodes) / 1000
        return seconds * self._failures.slow_factor

    # Completing a step.

    def _complete(self, work: Items[Work], now: float) -> None:
        total = 0
        for item in work:
            sequence = item.sequence
            if sequence.status != "running":
                continue
            total += item.count
            self._advance(sequence, item.count)
            if sequence.computed < len(sequence.tokens):
                continue
            self._failures.token_sampled()
            output = sequence.sample()
            self._metrics.sampled(sequence, now)
            if output.finish_reason is None:
                sequence.listener.on_output(sequence, output)
            else:
                self._running.remove(sequence)
                self._finish(sequence, output)
        self._metrics.iteration_tokens.observe(total)

    def _advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens have KV; full blocks become findable."""
        size = self._pool.block_size
        sequence.computed += count
        full = sequence.computed // size
        if full == sequence.cached_blocks:
            return
        hashes = sequence.hash_blocks(full, size)
        for i in range(sequence.cached_blocks, full):
            ids = sequence.tokens[i * size : (i + 1) * size]
            parent = hashes[i - 1] if i else None
            salt = sequence.cache_salt if i == 0 else None
            self._pool.cache(sequence.blocks[i], hashes[i], parent, ids, salt)
        sequence.cached_blocks = full

    def _finish(self, sequence: Sequence, output: Output) -> None:
        reason = output.finish_reason
        assert reason is not None
        if (
            self._producer is not None
            and sequence.kv_params.get("do_remote_decode")
            and reason in sequence.kv_params.get("keep_after", ("stop", "length"))
        ):
            ids = sequence.tokens[: sequence.computed]
            sequence.result_kv_params = self._producer.hold(sequence.request_id, sequence.blocks, ids)
            sequence.blocks = []
        self._end(sequence, reason)
        sequence.listener.on_output(sequence, output)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.status = "finished"
        self._release(sequence)
        self._metrics.finished(sequence, reason, time.monotonic())
        if self.unfinished == 0:
            self._idle.set()
        self.wake()

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.cached_blocks = 0
        sequence.computed = 0

    def _flush_events(self) -> None:
        if self._events and self._publish is not None:
            batch = self._events[:]
            self._events.clear()
            self._publish(batch)
