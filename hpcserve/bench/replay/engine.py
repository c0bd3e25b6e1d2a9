"""A simulated engine: one prefix cache with least-recently-used eviction, chunked prefill, batched decode.

Prompts are prefilled one after the other, a chunk in each step, while every running answer gets one token
per step. A step takes `chunk / prefill rate` plus, when answers are running, a base time and a little for
each of them. Between two changes of the batch all steps are alike, so the simulation jumps from change
to change.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from .trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The same for all simulated engines."""

    blocks: int = 2000
    """KV blocks of one engine, for running requests and the cache together."""
    prefill_rate: float = 8000.0
    """Prompt tokens a second."""
    chunk: int = 2048
    """Prompt tokens of one step: what vLLM calls max_num_batched_tokens."""
    step_base: float = 0.010
    """Seconds of a step that writes tokens, …"""
    step_per_answer: float = 0.00025
    """… and for each answer in the batch."""

    def step(self, answers: int) -> float:
        """Seconds of a step without prefill."""
        return self.step_base + self.step_per_answer * answers if answers else 0.0


class Job:
    """A request on an engine."""

    __slots__ = ("blocks_hit", "finished", "first_token", "request", "reserved", "uncached", "worker")

    def __init__(self, request: TraceRequest, worker: int) -> None:
        self.request = request
        self.worker = worker
        self.blocks_hit = 0
        self.uncached = 0
        self.first_token = 0.0
        self.finished = 0.0
        self.reserved = 0
        """Blocks kept for the answer."""

    @property
    def ttft(self) -> float:
        return self.first_token - self.request.arrival

    @property
    def itl(self) -> float:
        """The mean over the request's tokens, 0 for an answer of one."""
        gaps = self.request.output_tokens - 1
        return (self.finished - self.first_token) / gaps if gaps else 0.0


@dataclass(slots=True)
class Change:
    """What happened in an engine at the end of a phase."""

    first_token: Job | None
    finished: list[Job]
    stored: tuple[int, ...]
    removed: list[int]


class SimulatedEngine:
    """Call `submit` as requests arrive and `advance` at each `wake` time."""

    def __init__(self, model: EngineModel) -> None:
        self._model = model
        self._pinned: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that no request uses, least recently used first."""
        self._used = 0
        """Blocks pinned or reserved for answers."""
        self._waiting: deque[Job] = deque()
        self._prefill: Job | None = None
        self._prefill_left = 0
        self._running: list[tuple[int, int, Job]] = []
        """Heap by the step in which each finishes."""
        self._step = 0
        self._order = 0
        self._began = 0.0
        self._duration = 0.0
        self._steps = 0
        self.wake = math.inf
        """When `advance` must be called."""
        self.gaps: dict[float, int] = {}
        """Inter-token gaps in seconds -> how many."""
        self._removed: list[int] = []

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._prefill is not None)

    @property
    def usage(self) -> float:
        return self._used / self._model.blocks

    def submit(self, job: Job, now: float) -> None:
        self._waiting.append(job)
        if self.wake == math.inf:
            self._begin(now)
        elif self._prefill is None:
            # A step that runs is finished first.
            done = min(max(math.ceil((now - self._began) / self._duration - 1e-9), 1), self._steps)
            self._steps = done
            self.wake = self._began + done * self._duration

    def advance(self) -> Change:
        """The phase that ends at `wake` is over."""
        now = self.wake
        self._step += self._steps
        if self._running:
            gap = round(self._duration, 5)
            self.gaps[gap] = self.gaps.get(gap, 0) + self._steps * len(self._running)
        finished = []
        while self._running and self._running[0][0] <= self._step:
            finished.append(heapq.heappop(self._running)[2])
        for job in finished:
            self._release(job, now)
        first: Job | None = None
        stored: tuple[int, ...] = ()
        if self._prefill is not None:
            self._prefill_left -= self._steps
            if self._prefill_left <= 0:
                first, self._prefill = self._prefill, None
                first.first_token = now
                stored = first.request.blocks[first.blocks_hit :]
                if first.request.output_tokens <= 1:
                    self._release(first, now)
                    finished.append(first)
                else:
                    self._order += 1
                    end = self._step + first.request.output_tokens - 1
                    heapq.heappush(self._running, (end, self._order, first))
        self._begin(now)
        removed, self._removed = self._removed, []
        return Change(first, finished, stored, removed)

    def _begin(self, now: float) -> None:
        """Start the next phase."""
        self._began = now
        if self._prefill is None and self._waiting and self._admit(self._waiting[0]):
            self._prefill = self._waiting.popleft()
            self._prefill_left = max(math.ceil(self._prefill.uncached / self._model.chunk), 1)
        self._duration = self._model.step(len(self._running))
        if self._prefill is not None:
            steps = max(math.ceil(self._prefill.uncached / self._model.chunk), 1)
            self._duration += self._prefill.uncached / steps / self._model.prefill_rate
            self._steps = self._prefill_left
            if self._running:
                self._steps = min(self._steps, self._running[0][0] - self._step)
        elif self._running:
            self._steps = self._running[0][0] - self._step
        else:
            self.wake = math.inf
            return
        self.wake = now + self._steps * self._duration

    def _admit(self, job: Job) -> bool:
        """Pin the job's blocks; False while there is no room."""
        request = job.request
        hit = 0
        for block in request.blocks:
            if block not in self._pinned and block not in self._idle:
                break
            hit += 1
        reserved = math.ceil(request.output_tokens / BLOCK_TOKENS)
        fresh = len(request.blocks) - hit
        repinned = sum(block in self._idle for block in request.blocks)
        need = fresh + reserved
        if self._used + repinned + need > self._model.blocks and self._used:
            return False
        for block in request.blocks:
            count = self._pinned.get(block)
            if count is None:
                self._idle.pop(block, None)
                self._pinned[block] = 1
                self._used += 1
            else:
                self._pinned[block] = count + 1
        self._used += reserved
        job.reserved = reserved
        job.blocks_hit = hit
        job.uncached = max(request.prompt_tokens - hit * BLOCK_TOKENS, 1)
        while self._idle and self._used + len(self._idle) > self._model.blocks:
            self._removed.append(self._idle.popitem(last=False)[0])
        return True

    def _release(self, job: Job, now: float) -> None:
        job.finished = now
        self._used -= job.reserved
        # The end of a prompt is evicted before its beginning, which more prompts may share.
        for block in reversed(job.request.blocks):
            count = self._pinned[block]
            if count > 1:
                self._pinned[block] = count - 1
            else:
                del self._pinned[block]
                self._used -= 1
                self._idle[block] = None
