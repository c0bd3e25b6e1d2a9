# cython: language_level=3, cdivision=True
"""The policy `kv` over workers that answer by themselves, compiled: what `scores.py`, `pool.py` and `kv.py` do, in one pass.

Those are the reference and explain each term; `tests/router/placement/test_lowest.py` compares the two. Constants are
taken from `cost.py` when this is imported.
"""

from libc.math cimport exp

from . import cost
from ..board import Load
from .choice import Choice
from .pool import MEMORY
from .scores import lowest
from .seen import Reading, Seen

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
cdef double STEP_PER_STREAM = cost.STEP_PER_STREAM, _MEMORY = MEMORY


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


def choose(demand, list answering, view):
    """As LowestCost.choose() without prefill workers. None: nothing was done, and that has to choose."""
    held = view.held
    for match in held.values():
        if match.cpu or match.storage:
            return None
    for pool in <list>view._pools:
        if pool.workers == answering:
            break
    else:
        return None
    cdef ssize_t size = len(answering), at = 0, best_at
    if size < 2 or pool.partly_read:
        return None
    view._turn += 1
    pool.turn = view._turn
    _refresh(pool, view.mean_uncached, view.now)
    # As Pool.uncached().
    cdef long long total = demand.prompt_tokens, least, tokens
    if total < 1:
        total = 1
    cdef double per_chunk = demand.chunk_tokens, output = demand.output_tokens
    cdef list uncached = [total] * size
    for name, match in held.items():
        place = pool.index.get(name)
        if place is not None:
            tokens = total - <long long>(<double>match.gpu * per_chunk)
            uncached[place] = tokens if tokens > 1 else 1
    least = min(uncached)
    # As Scores.
    cdef double uses = view.uses(demand, least) if demand.chain else 0.0
    cdef double copied = uses / (1.0 + uses) if uses else 0.0
    cdef double behind = pool.behind, share = pool.prefilling
    if share > BUSIEST:
        share = BUSIEST
    cdef double factor = share / (1.0 - share) * behind
    cdef double saved = copied * (behind - 1.0), stall = output * factor, step = output * STEP_PER_STREAM
    cdef double streams, base, slope, seconds
    cdef list costs = [], workers = pool.workers, reads = pool.reads
    for at in range(size):
        worker = workers[at]
        _, streams, _, base, slope = reads[at]
        tokens = uncached[at]
        base += stall / (<double>worker.rates.decode * (behind + PER_STREAM * streams)) + step * streams
        if saved and tokens > least:
            base -= saved * (tokens - least) / <double>worker.rates.prefill
        costs.append(base + tokens * slope)
    cdef ssize_t session = pool.index.get(view.session, -1) if view.session else -1
    if session >= 0:
        seconds = costs[session]
        costs[session] = seconds - SESSION * <long long>uncached[session] / <double>workers[session].rates.prefill
    cdef list best = lowest(costs) if size > 2 else [0, 1] if <double>costs[0] <= <double>costs[1] else [1, 0]
    readings = []
    for place in best:
        best_at = place
        worker = workers[best_at]
        readings.append(
            Reading(
                worker.name, reads[best_at], uncached[best_at], worker.rates.prefill, worker.rates.decode, -1.0,
                best_at == session,
            )
        )
    seen = Seen(
        demand.prompt_tokens, demand.output_tokens, behind, factor, copied, least, tuple(readings)
    )
    worker = workers[best[0]]
    return Choice(worker, None, uncached[best[0]], "session" if worker.name == view.session else "", seen)
