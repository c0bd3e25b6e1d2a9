"""The policy `kv` as cost.py says it, term by term, with nothing done for speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpcserve.router.demand import Demand
from hpcserve.router.kv.match import Match
from hpcserve.router.placement import cost
from hpcserve.router.workers import Worker

Terms = dict[str, float]
Shown = list[tuple[str, float, Terms, int]]
"""Name, cost, terms, cached tokens."""


@dataclass
class Read:
    """A worker's load when it was read last."""

    wait: float
    streams: float
    usage: float
    busy: bool
    slope: float


@dataclass
class State:
    """What is kept of a set of workers."""

    prefilling: float
    seen: float = 0.0
    busy: float = 0.0
    next: int = -1
    reads: dict[int, Read] = field(default_factory=dict)


class Reference:
    def __init__(self) -> None:
        self.states: dict[tuple[str, ...], State] = {}
        """The one used last comes last."""
        self.uses: dict[int, tuple[float, float]] = {}
        self.sessions: dict[str, str] = {}
        self.mean_uncached = 4096.0

    def place(
        self,
        demand: Demand,
        answering: Sequence[Worker],
        prefill: Sequence[Worker],
        held: Mapping[str, Match],
        now: float,
    ) -> tuple[str, str | None, int, Shown]:
        self.counted = False
        session = self.sessions.get(demand.session or "")
        other = _Sums(self, demand, prefill, held, session, now, writes=False) if prefill else None
        own = _Sums(self, demand, answering, held, session, now, writes=True)
        if other is None and len(answering) == 1:
            return answering[0].name, None, own.uncached[0], []
        best = own.best()
        found: list[tuple[float, int, int]] = [(own.costs[at], at, -1) for at in best]
        if other is not None:
            for at in own.best_of_domains(own.pulled):
                for first in other.best_of_domains(other.costs):
                    found.append((own.pair_cost(at, other, first), at, first))
        found.sort()
        shown = [own.shown(at, other, first) for _, at, first in found[:3]]
        _, at, first = found[0]
        if other is None or first < 0:
            return answering[at].name, None, own.uncached[at], shown
        return answering[at].name, prefill[first].name, other.uncached[first], shown

    def placed(self, demand: Demand, worker: str, uncached: int) -> None:
        self.mean_uncached += 0.05 * (uncached - self.mean_uncached)
        if demand.session:
            self.sessions[demand.session] = worker

    def state(self, workers: Sequence[Worker]) -> State:
        key = tuple(worker.name for worker in workers)
        state = self.states.pop(key, None)
        if state is None:
            alike = [s for names, s in self.states.items() if names[0][:3] == key[0][:3]]
            state = State(alike[-1].prefilling if alike else 0.0)
        self.states[key] = state
        while len(self.states) > 8:
            del self.states[next(iter(self.states))]
        return state

    def used(self, demand: Demand, uncached: int, now: float) -> float:
        cached = (demand.prompt_tokens - uncached) / max(demand.chunk_tokens, 1.0)
        chunks = min(round(cached), len(demand.chain))
        if chunks <= 0:
            return 0.0
        chunk = demand.chain[chunks - 1]
        uses, at = self.uses.get(chunk, (0.0, now))
        uses *= math.exp((at - now) / 30.0)
        if not self.counted:
            self.counted = True
            self.uses[chunk] = uses + 1.0, now
        return uses


class _Sums:
    """A request's costs in one pool."""

    def __init__(
        self,
        reference: Reference,
        demand: Demand,
        workers: Sequence[Worker],
        held: Mapping[str, Match],
        session: str | None,
        now: float,
        *,
        writes: bool,
    ) -> None:
        self.demand, self.workers, self.held, self.writes, self.now = demand, workers, held, writes, now
        self.mean = max(reference.mean_uncached, 1.0)
        state = self.state = reference.state(workers)
        self.behind = cost.behind(state.prefilling)
        part = range(len(workers))
        if len(workers) > 32:
            if state.next >= 0:
                part = range(state.next, min(state.next + 32, len(workers)))
            state.next = part.stop % len(workers)
        busy = sum(self.read(at) for at in part) / len(part)
        if now > state.seen > 0.0:
            weight = 1.0 - math.exp((state.seen - now) / 60.0)
            state.prefilling += weight * ((busy + state.busy) / 2 - state.prefilling)
        state.seen, state.busy = now, busy
        self.behind = cost.behind(state.prefilling)
        self.uncached = [self.left(worker.name) for worker in workers]
        self.copied = cost.copied(reference.used(demand, min(self.uncached), now))
        self.session = [worker.name == session for worker in workers]
        self.bases = [self.base(at) for at in range(len(workers))]
        # By the slope as it was read: the share of time spent on prefill is counted after reading.
        self.costs = [base + self.computing(at) for at, base in enumerate(self.bases)]
        self.pulled = [
            base + cost.transfer(tokens, worker.rates)
            for base, tokens, worker in zip(self.bases, self.uncached, workers, strict=True)
        ]

    def read(self, at: int) -> bool:
        worker = self.workers[at]
        load, rate = worker.load, worker.rates.prefill
        wait, streams = 0.0, load.in_flight
        if load.prefill_tokens > 0.0:
            queue = worker.queue
            head = queue.sent[0] if queue.sent else 0
            wait = cost.wait(load.prefill_tokens, head, self.now - queue.since, rate)
            streams = max(streams - load.prefill_tokens / self.mean, 0.0)
        usage = 0.0
        if worker.facts is not None:
            usage = worker.facts.kv_usage
            if worker.facts.kv_tokens:
                usage = load.kv_tokens / worker.facts.kv_tokens
        slope = cost.prefill_factor(self.behind, streams) / rate
        read = self.state.reads[at] = Read(wait, streams, usage, load.prefill_tokens > 0.0, slope)
        return read.busy

    def left(self, name: str) -> int:
        total, match = max(self.demand.prompt_tokens, 1), self.held.get(name)
        return max(total - int(match.chunks * self.demand.chunk_tokens), 1) if match else total

    def terms(self, at: int) -> Terms:
        worker, read = self.workers[at], self.state.reads[at]
        rates, demand = worker.rates, self.demand
        seconds = self.uncached[at] / rates.prefill
        found = {
            "wait": read.wait,
            "prefill": seconds,
            "behind": seconds * (self.behind - 1.0),
            "disturbance": seconds * cost.PER_STREAM * read.streams,
            "barrier": cost.barrier(read.usage),
        }
        if self.writes:
            answer = demand.output_tokens / rates.decode
            factor = cost.prefill_factor(self.behind, read.streams)
            found["stall"] = answer * cost.stall_factor(self.state.prefilling, self.behind) / factor
            found["decode"] = cost.decode(read.streams, demand.output_tokens)
        if self.copied:
            more = (self.uncached[at] - min(self.uncached)) / rates.prefill
            found["copy"] = -self.copied * more * (self.behind - 1.0)
        match = self.held.get(worker.name)
        if match is not None and match.cpu + match.storage:
            host, disk = match.cpu * demand.chunk_tokens, match.storage * demand.chunk_tokens
            found["loading"] = cost.loading(host, disk, rates)
        if self.session[at]:
            found["session"] = -cost.SESSION * seconds
        return found

    def base(self, at: int) -> float:
        terms = self.terms(at)
        return sum(seconds for name, seconds in terms.items() if name not in _OF_PREFILL)

    def computing(self, at: int) -> float:
        return self.uncached[at] * self.state.reads[at].slope

    def best(self) -> list[int]:
        order = sorted(range(len(self.workers)), key=self.costs.__getitem__)
        for _ in range(3 if len(self.workers) > 32 else 0):
            more = self.read_again(order[0])
            if more <= 1e-9:
                break
            order = sorted(range(len(self.workers)), key=self.costs.__getitem__)
        return order[:3]

    def read_again(self, at: int) -> float:
        """What it costs more than was believed. What its streams cost stays as it was."""

        def known() -> float:
            read = self.state.reads[at]
            return read.wait + cost.barrier(read.usage) + self.computing(at)

        before = known()
        self.read(at)
        more = known() - before
        self.costs[at] += more
        self.bases[at] += more
        return more

    def best_of_domains(self, costs: list[float]) -> list[int]:
        """The cheapest of each."""
        order = sorted(range(len(costs)), key=costs.__getitem__)
        return list({self.workers[at].domain: at for at in reversed(order)}.values())

    def transfer(self, at: int, other: _Sums, first: int) -> float:
        domains = {self.workers[at].domain, other.workers[first].domain}
        near = len(domains) == 1 or None in domains
        seconds = cost.transfer(self.uncached[at], self.workers[at].rates)
        return seconds if near else seconds * cost.FAR

    def pair_cost(self, at: int, other: _Sums, first: int) -> float:
        return self.bases[at] + other.costs[first] + self.transfer(at, other, first) + cost.TWO_LEGS

    def shown(self, at: int, other: _Sums | None, first: int) -> tuple[str, float, Terms, int]:
        terms, name, uncached = self.terms(at), self.workers[at].name, self.uncached[at]
        if other is not None and first >= 0:
            mine, terms = terms, other.terms(first)
            for term, seconds in mine.items():
                if term not in _OF_PREFILL:
                    terms[term] = terms.get(term, 0.0) + seconds
            terms["transfer"], terms["two_legs"] = self.transfer(at, other, first), cost.TWO_LEGS
            name, uncached = f"{other.workers[first].name}+{name}", other.uncached[first]
        return name, sum(terms.values()), terms, max(self.demand.prompt_tokens - uncached, 0)


_OF_PREFILL = ("prefill", "behind", "disturbance")
