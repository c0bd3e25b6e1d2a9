# cython: language_level=3
"""Heads as the compiled way keeps them: what a client's says, and what of heads goes on to engines and to clients.

All of it is made by the functions of `call.py` and `http/client.py`, once for each head and worker; a request then
only puts its id, its length and its body in between.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdio cimport snprintf
from libc.string cimport memcpy

from ..http import client
from ..http.heads import Headers
from .board import Cell, Load
from .call import for_client, for_engine
from .relay import is_stream
from .routes import CHAT

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef enum:
    MOST_LEGS = 256
    WHOLE = 16384  # a request that goes out in one piece, as client.encode() has it


cdef class Known:
    """What a client's head says, read once: requests with the same head share it."""

    def __init__(self, route, exchange):
        self.route = route
        self.path = exchange.path
        self.target = exchange.target
        self.headers = exchange.headers
        self.named = dict(reversed(exchange.headers))
        self.length_at = -1
        for at, (name, _) in enumerate(exchange.headers):
            if name == b"content-length":
                self.length_at = at
        self.chat = route is CHAT
        # Others' demand is for `prompt.py` to read.
        form = self.named.get(b"content-type", b"").startswith(b"multipart/")
        self.plain = not form and b"x-hpcserve-priority" not in self.named and b"x-session-id" not in self.named
        self.good = self.identity = self.figures = self.answers = None
        self.legs = {}

    def header(self, bytes name):
        """As an Exchange has it."""
        return self.named.get(name)

    cdef tuple leg(self, worker, job_key, bint encoded):
        """Where requests to `worker` go, and their heads: up to the request's id, and from there to the length."""
        found = self.legs.get((worker.name, encoded))
        if found is not None and found[0] is worker:
            return found
        headers = for_engine(self.headers, b"@", job_key, encoded=encoded)
        origin, host, target = client.split(worker.url + self.target)
        [head] = client.encode("POST", host, target, [*headers, *worker.headers], None)
        before, mark, after = head[:-4].partition(b"\r\nx-request-id: @")
        found = (worker, origin, before + mark[:-1], after + b"\r\ncontent-length: ")
        if len(self.legs) >= MOST_LEGS:
            self.legs.clear()
        self.legs[worker.name, encoded] = found
        return found


cdef class Parts:
    """What all requests need of one router, looked up once: none of it is ever replaced."""

    def __init__(self, path):
        router = self.router = path.router
        self.path = path
        admission, metrics, runner, placer = router.admission, router.metrics, router.runner, router.placer
        self.admission, self.queue, self.budgets = admission, admission.queue, admission.budgets
        self.engine, self.keyring, self.runner = router.engine, router.keyring, runner
        self.prompts, self.account = router.prompts, router.account
        self.job_key, self.max_body = router.config.job_key, router.config.max_body
        self.first_byte_timeout = runner.legs.first_byte_timeout
        self.prefill, self.kv, self.computed = admission.prefill, admission.kv, admission._computed
        self.queued, self.ttft, self.latency = metrics.queue, metrics.ttft, metrics.latency
        self.decision, self.legs = metrics.decision, metrics.kv_legs
        account = router.account
        self.prompt, self.generated, self.predicted = account._prompt, account._generated, account._predicted
        self.time = path.loop.time
        self.place, self.placed = placer.place, placer.placed
        self.take, self.lacking = router.pool.take, admission.lacking
        self.hold, self.give_back = admission.bodies.take, admission.bodies.give_back
        self.keep, self.forget = runner.keep, runner.forget
        self.learn, self.count, self.remember = router.prompts.learn, router.meter.count, router.ring.put


cdef add(cell, double amount):
    """As Cell.add(), without a call where one process has all of it."""
    if type(cell) is Cell:
        cell.total = <double>cell.total + amount
    else:
        cell.add(amount)


cdef seat(load, double in_flight, double prefill_tokens, double kv_tokens):
    """As Load.add(), without a call where one process has all of it."""
    if type(load) is not Load:
        load.add(in_flight, prefill_tokens, kv_tokens)
        return
    load.in_flight = <double>load.in_flight + in_flight
    load.prefill_tokens = <double>load.prefill_tokens + prefill_tokens
    load.kv_tokens = <double>load.kv_tokens + kv_tokens


cdef grow(child, long long by):
    """As Child.inc()."""
    child.value = <object>child.value + by


cdef charge(queue, identity, double cost):
    """As FairQueue.charge()."""
    cdef dict charges = queue._charges
    key = identity.key
    charged = charges.get(key)
    charges[key] = (0.0 if charged is None else <double>charged) + cost / <double>identity.weight


cdef observe(histogram, double value):
    """As Histogram.observe()."""
    cdef ssize_t at = 0
    cdef double bound
    for bound in <tuple>histogram.bounds:
        if value <= bound:
            break
        at += 1
    cdef list counts = histogram.counts
    counts[at] = counts[at] + 1
    histogram.sum = <double>histogram.sum + value


cdef tuple counts(usage):
    """As Usage.of(), where an engine told prompt and completion tokens and no more; else None."""
    if type(usage) is not dict:
        return None
    prompt, completion = (<dict>usage).get("prompt_tokens"), (<dict>usage).get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or prompt < 0 or completion < 0:
        return None
    if (<dict>usage).get("prompt_tokens_details") or "input_tokens_details" in <dict>usage:
        return None
    return None if "cache_read_input_tokens" in <dict>usage else (prompt, completion)


cdef tuple told(headers):
    """Of an engine's headers: are they those of a stream; and the client's head, up to the request's id."""
    found = headers.told if type(headers) is Headers else None
    if found is None:
        lines = [b"HTTP/1.1 200 OK", *map(b": ".join, for_client(headers)), b"x-request-id: "]
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
            raise ValueError("a response header has a line break in it")
        found = (is_stream(200, headers), head)
        if type(headers) is Headers:
            headers.told = found
    return found


cdef bytes opening(bytes head, bytes given, bytes text, bint last):
    """An answer in chunks on the wire: its head, what is there of its body, and its end with the `last` of it."""
    cdef char size[20]
    cdef bytes framing = b"\r\ntransfer-encoding: chunked\r\n\r\n"
    cdef tuple parts = (head, given, framing)
    if text:
        snprintf(size, sizeof(size), b"%zx\r\n", PyBytes_GET_SIZE(text))
        parts = (head, given, framing, <bytes>size, text, b"\r\n")
    if last:
        parts += (b"0\r\n\r\n",)
    return b"".join(parts)


cdef tuple message(bytes before, bytes given, bytes after, bytes data, ssize_t start, bytes added, bint more):
    """A request on the wire, whose body is `data` from `start` on. `added` is put into the body, which has `more`
    members. All is copied together once, but for the rest of a long body."""
    cdef const char *text = PyBytes_AS_STRING(data)
    cdef ssize_t size = PyBytes_GET_SIZE(data) - start, brace = 0
    if added is not None:
        brace = data.index(b"{", start) + 1 - start
        if more:
            added = added + b","
        size += PyBytes_GET_SIZE(added)
    cdef bytes length = b"%d\r\n\r\n" % size
    cdef bint apart = size > WHOLE
    cdef tuple parts = (before, given, after, length)
    cdef bytes part
    if apart:
        size -= PyBytes_GET_SIZE(data) - start - brace
    for part in parts:
        size += PyBytes_GET_SIZE(part)
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, size)
    cdef char *to = PyBytes_AS_STRING(whole)
    for part in parts:
        memcpy(to, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        to += PyBytes_GET_SIZE(part)
    text += start
    if added is not None:
        memcpy(to, text, brace)
        memcpy(to + brace, PyBytes_AS_STRING(added), PyBytes_GET_SIZE(added))
        to += brace + PyBytes_GET_SIZE(added)
    if apart:
        return whole, memoryview(data)[start + brace:]
    memcpy(to, text + brace, PyBytes_GET_SIZE(data) - start - brace)
    return (whole,)
