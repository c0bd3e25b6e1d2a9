# cython: language_level=3
"""Which requests the compiled flight carries, and what it must know of them: `fast_path.py` in one pass.

Where a request is unusual, or is to be refused, nothing is done about it here: the ordinary way finds the same
again, and tells the client.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.string cimport memchr, memcmp

import os

import msgspec

from ..http.errors import HttpError
from .call import REQUEST_ID_HEADERS, request_id
from .demand import Demand
from .disaggregated import needs_local_prefill
from .keys.identity import BATCH, INTERACTIVE, NO_LIMITS
from .prompt import CHUNK, LIMITS, PLAIN_SPACE, PROBE, PROBE_EVERY, SELDOM
from .routes import CHAT, COMPLETIONS
from .stream.asked import ask, count

from .express cimport Express
from .known cimport Known, add
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

cdef object _decode = msgspec.json.Decoder().decode
cdef dict _ROUTES = {route.path: route for route in (CHAT, COMPLETIONS)}
cdef tuple _TELLING = ("use_beam_search", "kv_transfer_params", "ec_transfer_params", "vllm_xargs")
cdef tuple _PROMPTS = ("messages", "prompt", "input")
# The ordinary way reads them; what they say is not kept with a head either.
cdef frozenset _UNUSUAL = frozenset({b"content-encoding", b"x-hpcserve-explain"})
cdef frozenset _NOT_KEPT = frozenset(
    {*REQUEST_ID_HEADERS, b"x-hpcserve-on-behalf", b"expect", b"transfer-encoding", b"upgrade", b"connection"}
)
cdef bytes _random = b""
cdef ssize_t _next_id = 0
cdef ssize_t _chunk = CHUNK, _probe = PROBE, _probe_every = PROBE_EVERY
cdef enum:
    RANDOM = 4096  # bytes that are asked for at once


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


cdef class Lane:
    """One per FastPath."""

    cdef object _path
    cdef object _router
    cdef object _heads

    def __init__(self, path, heads):
        """`heads` are those that clients have sent."""
        self._path = path
        self._router = path.router
        self._heads = heads

    def whole(self, wire, data):
        """`data` is what a client sent next: answer it, if it is one request with a head that is known; False:
        nothing was done about it."""
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
        self._router.requests += 1
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
        if known.length_at >= 0 and _NOT_KEPT.isdisjoint(known.named) and self._heads.again(data):
            self._heads.keep(data, known.headers, known)

    cdef bint _open(self) except -1:
        router = self._router
        return router.state == "ready" and not router.admission.queue.waiting

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
        router = self._router
        engine, admission = router.engine, router.admission
        cdef ssize_t size = PyBytes_GET_SIZE(data) - start
        if not engine.can_resume or size > router.config.max_body:
            return None
        good = router.keyring._good
        if known.good is not good or known.identity is None:
            known.identity = router.keyring.identify(known)
            known.good = router.keyring._good
        identity = known.identity
        cdef dict fields = members(data, start)
        if not self._usual(fields) or not fields.keys().isdisjoint(engine.router_members):
            return None
        raw = fields.get("model")
        model = None if raw is None else _decode(raw)
        if model is not None and not isinstance(model, str):
            return None
        limits = identity.limits
        name, serving = router.models.serving(model, limits.models)
        if limits.models is not None:
            identity.check_model(name)
        if not serving.answering:
            return None
        prefill = ()
        if serving.disaggregated:
            prefill = serving.with_role("prefill")
            if engine.paired or not prefill or needs_local_prefill(fields) is not None:
                return None
        asked = ask(fields) if engine.names_tokens(chat=known.chat) else count(fields)
        demand = self._demand(known, data, start, fields, model or "", serving)
        if router.runner.end_time is not None:
            router.runner.check_walltime(Asking(data[start:], fields, known, serving), demand)
        bodies = admission.bodies
        if not bodies.take(size):
            return None
        cdef Express flight = Express.__new__(Express)
        entered = False
        try:
            entered = self._enter(flight, identity, demand)
        finally:
            if not entered:
                bodies.give_back(size)
        if not entered:
            return None
        flight.path, flight.router, flight.known = self._path, router, known
        flight.data, flight.body_at = data, start
        flight.given, flight.model, flight.serving, flight.prefill = fields, name, serving, prefill
        flight.asked = asked
        flight.held = []
        flight.request = ()
        flight.headers = ()
        flight.deadline = INFINITY
        router.account.entered(identity.name, 0.0)
        return flight

    cdef bint _usual(self, dict fields) except -1:
        """As `fast_path.usual()`."""
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
        admission = self._router.admission
        loop = admission.loop()
        cdef double now = loop.time(), cost, tokens
        if now >= <double>admission._next_look:
            admission.look(now)
        if admission.queue.waiting_anywhere:
            return False
        flight.arrived = now
        flight.identity = identity
        flight.demand = demand
        flight.tokens = tokens = demand.prompt_tokens
        flight.cost = cost = demand.prompt_tokens + demand.output_tokens
        if admission.lacking(tokens, cost) is not None:
            return False
        if identity.limits is not NO_LIMITS:
            flight.key = admission.quota.take(identity, cost, now)
        admission.queue.charge(identity.key, identity.weight, cost)
        admission.budgets.seen(tokens, cost)
        add(admission.prefill, tokens)
        add(admission.kv, cost)
        return True

    cdef _demand(self, Known known, bytes data, ssize_t start, dict fields, str model, serving):
        """As `Prompts.demand()`, for the prompts that most requests have."""
        prompts = self._router.prompts
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
        cdef tuple chain = ()
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
