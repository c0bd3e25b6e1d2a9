# cython: language_level=3
"""Which requests the compiled flight carries, and what it must know of them: `fast_path.py` in one pass.

Where a request is unusual, or is to be refused, nothing is done about it here: the ordinary way finds the same
again, and tells the client.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.string cimport memchr, memcmp

import logging
import os

import msgspec

from ..http.errors import HttpError
from .call import REQUEST_ID_HEADERS, request_id
from .demand import Demand
from .disaggregated import needs_local_prefill
from .keys.identity import NO_LIMITS
from .prompt import CHUNK, LIMITS, PLAIN_SPACE, PROBE, PROBE_EVERY, SELDOM
from .routes import CHAT, COMPLETIONS
from .admission.budgets import NEWEST
from .stream.asked import ABOUT, USUAL, ask, count

from .express cimport Express
from .known cimport Known, Parts, add, charge, observe
from .reading cimport LONG, links, members, whole_number

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

log = logging.getLogger(__name__)

cdef object _decode = msgspec.json.Decoder().decode
cdef dict _ROUTES = {route.path: route for route in (CHAT, COMPLETIONS)}
cdef tuple _TELLING = ("use_beam_search", "kv_transfer_params", "ec_transfer_params", "vllm_xargs")
cdef tuple _PROMPTS = ("messages", "prompt", "input")
# The ordinary way reads them; what they say is not kept with a head either.
cdef frozenset _UNUSUAL = frozenset({b"content-encoding", b"x-hpcserve-explain"})
cdef frozenset _NOT_KEPT = frozenset(
    {*REQUEST_ID_HEADERS, b"x-hpcserve-on-behalf", b"expect", b"transfer-encoding", b"upgrade"}
)
cdef bytes _random = b""
cdef ssize_t _next_id = 0
cdef double _newest = NEWEST
cdef ssize_t _chunk = CHUNK, _probe = PROBE, _probe_every = PROBE_EVERY
cdef enum:
    RANDOM = 4096  # bytes that are asked for at once
    MOST_MEANT = 256


cdef str new_id():
    """As `call.request_id()` makes one."""
    global _random, _next_id
    if _next_id >= PyBytes_GET_SIZE(_random):
        _random = os.urandom(RANDOM)
        _next_id = 0
    cdef bytes own = _random[_next_id:_next_id + 16]
    _next_id += 16
    return own.hex()


cdef class Asking:
    """What `prompt.py` and `runner.py` want to see of a Call."""

    cdef readonly bytes body
    cdef readonly dict fields
    cdef readonly Known exchange
    cdef readonly object serving

    def __init__(self, bytes body, dict fields, Known known, serving):
        self.body = body
        self.fields = fields
        self.exchange = known
        self.serving = serving


cdef bint _is(raw, const char *word, ssize_t size) except -1:
    """Is it this text?"""
    cdef Py_buffer view
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    cdef bint found = view.len == size and memcmp(view.buf, word, size) == 0
    PyBuffer_Release(&view)
    return found


cdef bint _given(raw) except -1:
    cdef Py_buffer view
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    cdef ssize_t size = view.len
    PyBuffer_Release(&view)
    return size > 4 or not (_is(raw, b"null", 4) or _is(raw, b'""', 2) or _is(raw, b"[]", 2) or size == 0)


cdef bint _may_hold_base64(const char *text, ssize_t size) noexcept:
    cdef ssize_t start = _probe
    while start < size - _probe:
        if memchr(text + start, 32, _probe) == NULL:
            return True
        start += _probe_every
    return False


cdef class Meant:
    """What a model's name means to `Models`, as long as the table of workers is the same."""

    cdef str name
    cdef object serving
    cdef bint disaggregated
    cdef list answering
    cdef object prefill


cdef class Lane:
    """One per FastPath."""

    cdef Parts _parts
    cdef object _heads
    cdef frozenset _refused
    cdef bint _names_in_chat
    cdef bint _names_in_text
    cdef dict _meant
    cdef object _version

    def __init__(self, path, heads):
        """`heads` are those that clients have sent."""
        self._parts = Parts(path)
        self._heads = heads
        engine = self._parts.engine
        self._refused = frozenset(engine.router_members)
        self._names_in_chat, self._names_in_text = engine.names_tokens(chat=True), engine.names_tokens(chat=False)
        self._meant = {}
        self._version = None

    def whole(self, wire, data):
        """See `http.host.Express`: `data` is what a client sent next. Answer it, if it is one request with a head
        that is known; False: nothing was done about it."""
        try:
            return self._whole(wire, data)
        except Exception:
            log.exception("the compiled way failed")
            return False

    cdef bint _whole(self, wire, data) except -1:
        if type(data) is not bytes or not self._open():
            return False
        found = self._heads.find(data)
        if found is None:
            return False
        cdef Known known = found[0]
        cdef ssize_t end = found[1], length = found[2]
        if length <= 0 or PyBytes_GET_SIZE(data) - end != length:
            return False
        # A long body stays where it is.
        cdef Express flight = self._flight(known, data, end) if length >= LONG else self._flight(known, data[end:], 0)
        if flight is None:
            return False
        headers = known.headers
        if known.length_at >= 0:
            digits = b"%d" % length
            if headers[known.length_at][1] != digits:
                headers = list(headers)
                headers[known.length_at] = (b"content-length", digits)
        exchange = wire.read(known.target, known.path, headers, memoryview(data)[end:] if length >= LONG else flight.data)
        self._parts.router.requests += 1
        self._start(flight, exchange, wire, new_id())
        return True

    def take(self, exchange):
        """Answer this request, which is whole; False: nothing was done about it."""
        if not self._open() or exchange.method != "POST":
            return False
        route = _ROUTES.get(exchange.path)
        if route is None or exchange._minor != 1 or not exchange._keep:
            return False
        cdef Known known = Known(route, exchange)
        if not _UNUSUAL.isdisjoint(known.named):
            return False
        cdef Express flight = self._flight(known, exchange.whole(), 0)
        if flight is None:
            return False
        self._start(flight, exchange, exchange._wire, request_id(exchange))
        return True

    def learn(self, bytes data, exchange):
        """`data` was the whole of the request that `exchange` answers: should it come again, know its head."""
        cdef Known known
        if type(exchange.owner) is not Express:
            return
        known = (<Express>exchange.owner).known
        if known.length_at < 0 or not _NOT_KEPT.isdisjoint(known.named) or not self._heads.again(data):
            return
        if all([value.lower() == b"keep-alive" for name, value in known.headers if name == b"connection"]):
            self._heads.keep(data, known.headers, known)

    cdef bint _open(self) except -1:
        return self._parts.router.state == "ready" and not self._parts.queue.waiting

    cdef _start(self, Express flight, exchange, wire, str given):
        flight.exchange = exchange
        flight.wire = wire
        flight.request_id = given
        flight.start()

    cdef Express _flight(self, Known known, bytes data, ssize_t start):
        """One that was let in, whose body is `data` from `start` on; None where the ordinary way must answer."""
        try:
            return self._let_in(known, data, start)
        except (HttpError, RecursionError, UnicodeDecodeError, msgspec.MsgspecError):
            return None

    cdef Express _let_in(self, Known known, bytes data, ssize_t start):
        cdef Parts parts = self._parts
        engine = parts.engine
        cdef ssize_t size = PyBytes_GET_SIZE(data) - start
        if not engine.can_resume or size > parts.max_body:
            return None
        good = parts.keyring._good
        if known.good is not good or known.identity is None:
            known.identity = parts.keyring.identify(known)
            known.good = parts.keyring._good
            known.figures = parts.account.key(known.identity.name)
        identity = known.identity
        cdef dict fields = members(data, start)
        if not self._usual(fields) or (self._refused and not self._refused.isdisjoint(fields)):
            return None
        raw = fields.get("model")
        model = None if raw is None else _decode(raw)
        if model is not None and not isinstance(model, str):
            return None
        limits = identity.limits
        cdef Meant meant = self._means(model, limits)
        if limits.models is not None:
            identity.check_model(meant.name)
        if not meant.answering:
            return None
        if meant.disaggregated and (
            engine.paired or not meant.prefill or needs_local_prefill(fields) is not None
        ):
            return None
        if not (self._names_in_chat if known.chat else self._names_in_text):
            asked = count(fields)
        else:
            asked = USUAL if ABOUT.isdisjoint(fields) else ask(fields)
        demand = self._demand(known, data, start, fields, model or "", meant.serving)
        if parts.runner.end_time is not None:
            parts.runner.check_walltime(Asking(data[start:], fields, known, meant.serving), demand)
        if not parts.hold(size):
            return None
        cdef Express flight = Express.__new__(Express)
        entered = False
        try:
            entered = self._enter(flight, identity, demand)
        finally:
            if not entered:
                parts.give_back(size)
        if not entered:
            return None
        flight.parts, flight.known = parts, known
        flight.data, flight.body_at = data, start
        flight.given, flight.model, flight.serving = fields, meant.name, meant.serving
        flight.answering, flight.prefill = meant.answering, meant.prefill
        flight.asked = asked
        flight.held = []
        flight.request = ()
        flight.headers = ()
        flight.deadline = INFINITY
        # As Account.let_in().
        observe(parts.queued, 0.0)
        known.figures.requests.value += 1
        return flight

    cdef Meant _means(self, model, limits):
        """As Models.serving(). Raises HttpError."""
        table = self._parts.router.table
        if self._version != table.version:
            self._meant.clear()
            self._version = table.version
        cdef Meant meant = self._meant.get(model)
        if meant is None:
            meant = Meant()
            meant.name, meant.serving = self._parts.router.models.serving(model, limits.models)
            meant.disaggregated = meant.serving.disaggregated
            meant.answering = meant.serving.answering
            meant.prefill = meant.serving.with_role("prefill") if meant.disaggregated else ()
            if len(self._meant) >= MOST_MEANT:
                self._meant.clear()
            self._meant[model] = meant
        return meant

    cdef bint _usual(self, dict fields) except -1:
        """As `fast_path._usual()`."""
        raw = fields.get("stream")
        if raw is None or not _is(raw, b"true", 4):
            return False
        raw = fields.get("n")
        if raw is not None and not _is(raw, b"1", 1):
            return False
        for name in _TELLING:
            if name in fields:
                return False
        raw = fields.get("prompt")
        if raw is None:
            return True
        cdef bytes start = bytes(memoryview(raw)[:2])
        return start[:1] == b'"' or start[1:].isdigit()

    cdef bint _enter(self, Express flight, identity, demand) except -1:
        """As Ticket.enter(). Raises HttpError 403 and 429 for its key's limits."""
        cdef Parts parts = self._parts
        admission = parts.admission
        if admission._loop is None:
            admission.loop()
        cdef double now = parts.time(), cost, tokens, mean
        if now >= <double>admission._next_look:
            admission.look(now)
        queue, budgets = parts.queue, parts.budgets
        if queue.waiting or <double>queue._everywhere.total > 0.0:
            return False
        flight.arrived = now
        flight.identity = identity
        flight.demand = demand
        flight.tokens = tokens = demand.prompt_tokens
        flight.cost = cost = demand.prompt_tokens + demand.output_tokens
        if parts.lacking(tokens, cost) is not None:
            return False
        if identity.limits is not NO_LIMITS:
            flight.key = admission.quota.take(identity, cost, now)
        charge(queue, identity, cost)
        # As Budgets.seen(); each prompt has at least one token.
        mean = budgets.prompt_tokens
        budgets.prompt_tokens = mean + _newest * (tokens - mean)
        mean = budgets.tokens
        budgets.tokens = mean + _newest * (cost - mean)
        add(parts.prefill, tokens)
        add(parts.kv, cost)
        return True

    cdef _demand(self, Known known, bytes data, ssize_t start, dict fields, str model, serving):
        """As `Prompts.demand()`, for the prompts that most requests have."""
        prompts = self._parts.prompts
        if not known.plain or not SELDOM.isdisjoint(fields) or model not in prompts.served:
            return prompts.demand(Asking(data[start:], fields, known, serving))
        last = None
        for name in _PROMPTS:
            last = fields.get(name)
            if last is not None and _given(last):
                break
        else:
            return prompts.demand(Asking(data[start:], fields, known, serving))
        cdef Py_buffer view
        PyObject_GetBuffer(last, &view, PyBUF_SIMPLE)
        cdef const char *text = <const char *>view.buf
        cdef ssize_t size = view.len - 1
        cdef bint unusual = (name == "prompt" and size > 0 and text[0] == 91) or _may_hold_base64(text, size)
        chain = ()
        try:
            if not unusual and size >= _chunk:
                chain = links(text, size, PLAIN_SPACE)
        finally:
            PyBuffer_Release(&view)
        if unusual:
            return prompts.demand(Asking(data[start:], fields, known, serving))
        learned = prompts.model(model)
        cdef double ratio = learned.ratio, answer = learned.answer
        cdef long long expected = <long long>answer or 1, most, tokens = <long long>(size * ratio)
        for name in LIMITS:
            raw = fields.get(name)
            if raw is not None:
                most = whole_number(raw)
                if most >= 0:
                    expected = min(expected, most)
                    break
        return Demand(
            prompt_tokens=tokens if tokens > 1 else 1, output_tokens=expected,
            chain=chain,
            chunk_tokens=_chunk * ratio, session=None, priority=0, model=model, prompt_bytes=size,
            space=PLAIN_SPACE,
        )
