# cython: language_level=3, cdivision=True
"""The policy `kv` over workers and pairs of workers, compiled: what `scores.py`, `pool.py` and `kv.py` do, in one pass.

Those are the reference and explain each term; `tests/router/placement/test_lowest.py` compares the two. Constants are
taken from `cost.py` when this is imported.
"""

from libc.math cimport exp

from . import cost
from ..board import Load
from .choice import Choice
from .pool import MEMORY
from .scores import SHOWN, lowest
from .seen import Reading, Seen, SeenPairs

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef double BARRIER = cost.BARRIER, BEHIND = cost.BEHIND, BUSIEST = cost.BUSIEST, FULLEST = cost.FULLEST
cdef double PER_STREAM = cost.PER_STREAM, PROGRESS = cost.PROGRESS, SESSION = cost.SESSION
cdef double STEP_PER_STREAM = cost.STEP_PER_STREAM, FAR = cost.FAR, TWO_LEGS = cost.TWO_LEGS, _MEMORY = MEMORY
cdef ssize_t _SHOWN = SHOWN


cdef double _wait(double queued, double head, double seconds, double rate) noexcept:
    """As cost.wait()."""
    cdef double done = seconds * PROGRESS * rate, most = 0.9 * head
    if most > queued:
        most = queued
    if done > most:
        done = most
    return (queued - done if done > 0.0 else queued) / rate


cdef double _behind(double prefilling) noexcept:
    """As cost.behind()."""
    cdef double share = prefilling if prefilling < BUSIEST else BUSIEST
    return 1.0 + BEHIND * share / (1.0 - share)


cdef _refresh(pool, double mean_uncached, double now):
    """As Pool.refresh() of a pool whose loads are all read each time."""
    cdef double streams, queued, kv_tokens, rate, waits, usage, fixed, used, weight, share, behind = pool.behind
    cdef ssize_t at = 0, working = 0
    cdef list reads = pool.reads
    for worker in <list>pool.workers:
        load = worker.load
        if type(load) is Load:
            streams, queued, kv_tokens = load.in_flight, load.prefill_tokens, load.kv_tokens
        else:
            streams, queued, kv_tokens = load.read()
        rate = worker.rates.prefill
        waits = 0.0
        if queued > 0.0:
            working += 1
            queue = worker.queue
            waits = _wait(queued, queue.head, now - <double>queue.since, rate)
            streams -= queued / mean_uncached
            if streams < 0.0:
                streams = 0.0
        facts = worker.facts
        usage = 0.0
        if facts is not None:
            usage = kv_tokens / <double>facts.kv_tokens if facts.kv_tokens else facts.kv_usage
        fixed = waits
        if usage > 0.0:
            used = usage if usage < FULLEST else FULLEST
            fixed += BARRIER * used / (1.0 - used)
        reads[at] = (waits, streams, usage, fixed, (behind + PER_STREAM * streams) / rate)
        at += 1
    cdef double busy = <double>working / at, seen = pool._seen
    if now > seen > 0.0:
        weight = 1.0 - exp((seen - now) / _MEMORY)
        share = pool.prefilling
        share += weight * ((busy + <double>pool._busy) / 2 - share)
        pool.prefilling = share
        pool.behind = _behind(share)
    pool._seen = now
    pool._busy = busy


cdef class Side:
    """As Scores, of workers that hold nothing in slower memory."""

    cdef object pool
    cdef list workers
    cdef list reads
    cdef list uncached
    cdef list bases
    cdef list costs
    cdef long long least
    cdef double behind
    cdef double stall
    cdef double copied
    cdef ssize_t session

    def __init__(self, demand, pool, view, bint writes, bint paired):
        cdef list workers = pool.workers, reads, uncached, costs = [], bases = []
        cdef ssize_t size = len(workers), at
        view._turn += 1
        pool.turn = view._turn
        _refresh(pool, view.mean_uncached, view.now)
        reads = pool.reads
        # As Pool.uncached().
        cdef long long total = demand.prompt_tokens, least, tokens
        if total < 1:
            total = 1
        cdef double per_chunk = demand.chunk_tokens, output = demand.output_tokens
        uncached = [total] * size
        if view.held:
            index = pool.index
            for name, match in view.held.items():
                place = index.get(name)
                if place is not None:
                    tokens = total - <long long>(<double>match.gpu * per_chunk)
                    uncached[place] = tokens if tokens > 1 else 1
        least = min(uncached)
        # As Scores.
        cdef double uses = view.uses(demand, least) if demand.chain else 0.0
        cdef double copied = uses / (1.0 + uses) if uses else 0.0
        cdef double behind = pool.behind, share = pool.prefilling, factor = -1.0, stall = 0.0, step = 0.0
        cdef double saved = copied * (behind - 1.0), streams, base, slope, credit
        if writes:
            if share > BUSIEST:
                share = BUSIEST
            factor = share / (1.0 - share) * behind
            stall = output * factor
            step = output * STEP_PER_STREAM
        for at in range(size):
            _, streams, _, base, slope = reads[at]
            tokens = uncached[at]
            if writes:
                base += stall / (<double>workers[at].rates.decode * (behind + PER_STREAM * streams)) + step * streams
            if saved and tokens > least:
                base -= saved * (tokens - least) / <double>workers[at].rates.prefill
            if paired:
                bases.append(base)
            costs.append(base + tokens * slope)
        cdef ssize_t session = pool.index.get(view.session, -1) if view.session else -1
        if session >= 0:
            tokens = uncached[session]
            credit = SESSION * tokens / <double>workers[session].rates.prefill
            costs[session] = <double>costs[session] - credit
            if paired:
                bases[session] = <double>bases[session] - credit
        self.pool, self.workers, self.reads, self.uncached, self.bases, self.costs = (
            pool, workers, reads, uncached, bases, costs,
        )
        self.least, self.behind, self.stall, self.copied, self.session = least, behind, factor, copied, session

    cdef list best(self):
        cdef list costs = self.costs
        if len(costs) == 1:
            return [0]
        if len(costs) == 2:
            return [0, 1] if <double>costs[0] <= <double>costs[1] else [1, 0]
        return lowest(costs)

    cdef seen(self, demand, list places):
        cdef list readings = []
        cdef ssize_t at
        for at in places:
            if at < 0:
                readings.append(None)
                continue
            worker = self.workers[at]
            rates = worker.rates
            readings.append(
                Reading(
                    worker.name, self.reads[at], self.uncached[at], rates.prefill, rates.decode, -1.0,
                    at == self.session,
                )
            )
        return Seen(
            demand.prompt_tokens, demand.output_tokens, self.behind, self.stall, self.copied, self.least,
            tuple(readings),
        )

    cdef list best_of_each_domain(self, list costs):
        cdef list domains = self.pool.domains
        if len(costs) == 1:
            return [0]
        if len(costs) == len(domains):
            return list(range(len(costs)))
        return [min(places, key=costs.__getitem__) for places in domains]


cdef _known(list workers, view):
    """The pool of these workers, if there is one whose loads are all read each time."""
    for pool in <list>view._pools:
        if pool.workers == workers:
            return None if pool.partly_read else pool
    return None


cdef bint _slow(held) except -1:
    """Is some of the prompt in slower memory?"""
    if held:
        for match in held.values():
            if match.cpu or match.storage:
                return True
    return False


def choose(demand, list answering, view):
    """As LowestCost.choose() without prefill workers. None: nothing was done, and that has to choose."""
    if len(answering) < 2 or _slow(view.held):
        return None
    pool = _known(answering, view)
    if pool is None:
        return None
    cdef Side own = Side(demand, pool, view, True, False)
    cdef list best = own.best()
    worker = own.workers[best[0]]
    reason = "session" if worker.name == view.session else ""
    return Choice(worker, None, own.uncached[best[0]], reason, own.seen(demand, best))


def choose_pair(demand, list answering, list prefill, view):
    """The same with prefill workers."""
    if _slow(view.held):
        return None
    others, pool = _known(prefill, view), _known(answering, view)
    if others is None or pool is None:
        return None
    # In this order: the popularity of what the first of them hold is what counts.
    cdef Side other = Side(demand, others, view, False, False)
    cdef Side own = Side(demand, pool, view, True, True)
    cdef list pulls = [], pulled = [], found = [], seconds = [], firsts = [], transfers = []
    cdef ssize_t at, first, size = len(own.workers)
    cdef double pull, base
    for at in range(size):
        # As cost.transfer().
        rates = own.workers[at].rates
        pull = <long long>own.uncached[at] * <double>rates.kv_bytes_per_token / <double>rates.transfer
        pulls.append(pull)
        pulled.append(<double>own.bases[at] + pull)
    if not view.pairs_only:
        for at in own.best():
            found.append((own.costs[at], at, -1, 0.0))
    cdef list near = other.best_of_each_domain(other.costs)
    for at in own.best_of_each_domain(pulled):
        domain = own.workers[at].domain
        base = <double>own.bases[at] + TWO_LEGS
        for first in near:
            pull = pulls[at]
            there = other.workers[first].domain
            # Where nothing is known of topology, all are near.
            if domain is not None and there is not None and domain != there:
                pull *= FAR
            found.append((base + <double>other.costs[first] + pull, at, first, pull))
    found.sort()
    for _, at, first, pull in found[:_SHOWN]:
        seconds.append(at)
        firsts.append(first)
        transfers.append(pull)
    shown = SeenPairs(own.seen(demand, seconds), other.seen(demand, firsts), tuple(transfers))
    at, first = seconds[0], firsts[0]
    worker = own.workers[at]
    reason = "session" if worker.name == view.session else ""
    if first < 0:
        return Choice(worker, None, own.uncached[at], reason or "prefill is quicker on decode", shown)
    return Choice(worker, other.workers[first], other.uncached[first], reason, shown)
