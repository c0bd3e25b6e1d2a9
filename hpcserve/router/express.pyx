# cython: language_level=3
"""The usual flight, compiled: from a worker's choice to the last byte of its stream, as long as all goes well.

It does what `flight.py` does, and has fields of its own for what a Call, a Ticket and a Seat hold. Whatever is not
usual (a worker that fails, an answer that is no stream, a client that leaves) makes it a `Flight` in the same
state, which goes on. `lane.pyx` decides which requests come here.
"""

from cpython.bytes cimport PyBytes_GET_SIZE
from libc.math cimport INFINITY

import msgspec

from .admission.admission import Ticket
from .call import Call
from .disaggregated import PREFILL_ANSWER_MAX
from .flight import Flight
from .relay import inter_token
from .stream.asked import ADDED, ADDED_BYTES, splice
from .stream.generated import GIVEN_UP, EngineFault, given_up
from .stream.pumping import Ride
from .usage import Usage
from .workers import Seat

from .known cimport Parts, add, charge, counts, grow, message, observe, opening, seat, told
from .stream.answer cimport AnswerStream

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef object _encode = msgspec.json.encode
cdef object _decode = msgspec.json.decode
cdef tuple _TRANSFERRED = ("result", "transferred")


cdef class Express:
    """Reads the engines' answers, owns the client's exchange, and is a lease of the worker it is on."""

    @property
    def pieces(self):
        """Pieces of the stream that have come so far."""
        carried = 0 if self.ride is None else self.ride.pieces
        return carried if self.stream is None else carried + self.stream.pieces

    cdef bytes body(self):
        return self.data[self.body_at:] if self.body_at else self.data

    cdef start(self):
        """Choose workers, and ask the first."""
        router = self.parts.router
        cdef long running = router.in_flight + 1
        router.in_flight = running
        if running == 1:
            router.idle.clear()
        self.exchange.owner = self
        self.parts.path.flights.add(self)
        try:
            self._place()
        except Exception:
            self.python()._crashed()

    cdef _place(self):
        cdef Parts parts = self.parts
        demand = self.demand
        cdef double now = self.arrived
        decision = self.decision = parts.place(
            demand, answering=self.answering, prefill=self.prefill, now=now
        )
        assert decision is not None
        parts.placed(decision, demand, now)
        self.giver, self.uncached = decision.prefill, decision.uncached_tokens
        cdef double uncached = self.uncached
        if uncached != self.tokens:
            add(parts.prefill, uncached - self.tokens)
            self.tokens = uncached
        if self.giver is None:
            if self.prefill:
                parts.legs.add(("result", "local"), ("reason", "quicker"))
            added = self.asked.added
            if added is ADDED:
                self._ask(decision.answering, self.data, self.body_at, ADDED_BYTES, now)
            else:
                self._ask(decision.answering, splice(self.body(), self.given, added), 0, None, now)
            return
        self.fields = {**self.given, **self.asked.added}
        try:
            leg = _encode(parts.engine.prefill_request(self.fields))
        except (TypeError, ValueError, KeyError):
            self.python()._again()
            return
        self._ask(self.giver, leg, 0, None, now)

    cdef _ask(self, worker, bytes data, ssize_t start, bytes added, double now):
        """Send `data` from `start` on to `worker`, and count it there. `added` goes behind its first brace, as
        splice() has it."""
        cdef Parts parts = self.parts
        self.worker = worker
        self.since = now
        self.deadline = now + parts.first_byte_timeout
        # As a Seat does.
        cdef bint first_leg = worker is self.giver
        self.computes = first_leg or self.giver is None
        self.seat_prefill = self.uncached if self.computes else 0.0
        self.seat_kv = self.demand.prompt_tokens + (0 if first_leg else self.demand.output_tokens)
        self.seated = True
        worker.leases.add(self)
        seat(worker.load, 1.0, self.seat_prefill, self.seat_kv)
        if worker.breaker.avoid_until:
            worker.breaker.asked(now)
        if self.computes:
            worker.queue.began(self.uncached, now)
        _, origin, before, after = self.known.leg(worker, parts.job_key, bool(self.prefill))
        given = self.request_id.encode("ascii")
        self.request = message(before, given, after, data, start, added, bool(self.given))
        connection = parts.take(origin)
        self.fresh = connection is None
        if connection is None:
            self.python().connect(origin)
        else:
            self.connection = connection
            connection.ask(self.request, self)

    # What the connection to the worker says

    def head(self, int status, headers):
        self.status, self.headers = status, headers

    def feed(self, bytes data):
        self.within(data, 0, PyBytes_GET_SIZE(data), False)

    def end(self, bytes last):
        self.within(last, 0, PyBytes_GET_SIZE(last), True)

    def within(self, bytes data, ssize_t start, ssize_t stop, bint last):
        """As feed() and end(), of `data[start:stop]`."""
        if last:
            self.connection = None
            self._leave_pump()
        try:
            if self.streams and not last:
                (<AnswerStream>self.stream).take(data, start, stop)
                if self.ride is not None and self.stream.steady:
                    self.ride.board()
            else:
                self._take(data, start, stop, last)
        except EngineFault as fault:
            self.python()._broke(fault)
        except Exception:
            self.python()._crashed()

    cdef _take(self, bytes data, ssize_t start, ssize_t stop, bint last):
        """A piece of an answer: `data[start:stop]`."""
        worker = self.worker
        if worker is None:
            return
        cdef bint first = self.deadline != INFINITY
        if first:
            if self.status != 200 or not (worker is self.giver or told(self.headers)[0]):
                self._hand_over(data[start:stop], last)
                return
            self.deadline = INFINITY
            self.request = ()
            self._first_byte(worker)
        if worker is self.giver:
            self._collect(worker, data[start:stop], last)
        else:
            self._pass_on(data, start, stop, last)

    cdef _hand_over(self, bytes data, bint last):
        """Whatever this is, a Flight knows."""
        flight = self.python()
        if last:
            flight.end(data)
        else:
            flight.feed(data)

    cdef _first_byte(self, worker):
        """The prompt is computed, or its KV is there."""
        if worker.breaker.avoid_until:
            worker.breaker.succeeded()
        if self.giver is not None and worker is not self.giver:
            self.giver.breaker.handed_over()
        if self.seat_prefill:
            seat(worker.load, 0.0, -self.seat_prefill, 0.0)
            self.seat_prefill = 0.0
        if self.computes:
            self.computes = False
            now = self.parts.time()
            worker.queue.ended(self.uncached, now, now - self.since)

    # The prefill worker's answer

    cdef _collect(self, worker, bytes data, bint last):
        cdef Parts parts = self.parts
        decision = self.decision
        if not last or PyBytes_GET_SIZE(data) > PREFILL_ANSWER_MAX or decision.answering.gone:
            self._hand_over(data, last)
            return
        if GIVEN_UP in data:
            raise given_up()
        try:
            body = parts.engine.decode_request(self.fields, _decode(data))
        except (KeyError, AttributeError, msgspec.DecodeError):
            self.python()._again()
            return
        parts.legs.add(_TRANSFERRED)
        self._leave_worker()
        self._ask(decision.answering, _encode(body), 0, None, parts.time())

    # The answer

    cdef _pass_on(self, bytes data, ssize_t start, ssize_t stop, bint last):
        stream = self.stream
        if stream is None:
            stream = self.stream = AnswerStream(
                self.held.append, self.asked, chat=self.known.chat, on_prompt_ids=self.keep
            )
        if last and self.streams:
            self.exchange.cork()
        if stop > start:
            (<AnswerStream>stream).take(data, start, stop)
        if last:
            stream.end()
            if stream.has_error:
                self.python()._pass_on(b"", last=True)
                return
        if not self.streams:
            # An error that comes first can still be another worker's answer.
            if not self.held and not last:
                return
            self._begin(stream, last)
        elif last:
            self._leave_worker()
            self.exchange.finish()
        if last:
            self._complete(stream)

    cdef _begin(self, stream, bint last):
        """The client's answer begins; with its `last` piece it is whole."""
        exchange = self.exchange
        self.streams = True
        self.first_at = self.parts.time()
        observe(self.parts.ttft, self.first_at - self.arrived)
        if not self.first:
            self.first = True
            self._computed()
        exchange.started = True
        exchange.status = 200
        exchange._chunked = True
        cdef bytes text = self.held[0] if len(self.held) == 1 else b"".join(self.held)
        self.held.clear()
        cdef bytes sent = opening(told(self.headers)[1], self.request_id.encode("ascii"), text, last)
        if last:
            self._leave_worker()
            exchange.finished = True
            exchange.owner = None
            self.wire.send(sent)
            exchange._chunks.clear()
            self.wire.answered(exchange, True)
            return
        stream.write_to(exchange.write)
        self.wire.send(sent)
        if self.connection is not None:
            if exchange.congested:
                self.connection.pause()
            pump = self.parts.path.pump
            if pump is not None:
                self.ride = Ride(pump, self.connection, exchange, stream)

    cdef _complete(self, stream):
        """The client has the whole answer."""
        self._leave_worker()
        self._served(stream)
        self._close()
        answers = self.known.answers
        if answers is None:
            answers = self.known.answers = self.parts.account.answers(self.known.path, 200)
        answers.value += 1

    cdef _computed(self):
        """As Admission.computed()."""
        cdef Parts parts = self.parts
        add(parts.prefill, -self.tokens)
        add(parts.computed, self.tokens)
        if parts.queue.waiting:
            parts.admission.dispatch()

    cdef _served(self, stream):
        """As Account.served(), Ticket.used() and Ticket.leave()."""
        cdef Parts parts = self.parts
        demand, identity = self.demand, self.identity
        if self.exchange.status == 200 and self.exchange.finished:
            observe(parts.latency, <double>parts.time() - self.arrived)
        cdef long long prompt, cached, completion
        counted = counts(stream.usage)
        gap = inter_token(stream, self.first_at) if stream.events > 1 else None
        if counted is None or gap is not None:
            usage = Usage.of(stream.usage)
            parts.account.counted(identity.name, demand, gap, usage, self.decision)
            if usage is None:
                # As Ticket._guess().
                prompt, cached = demand.prompt_tokens, 0
                completion = <long long>self.cost - prompt
            else:
                prompt, cached, completion = usage.prompt_tokens, usage.cached_tokens or 0, usage.completion_tokens
        else:
            prompt, cached, completion = counted[0], 0, counted[1]
            # As Account.counted(), of an answer in one event whose engine does not say what was cached.
            parts.learn(demand, prompt, completion)
            figures = self.known.figures
            grow(parts.prompt, prompt)
            grow(parts.generated, completion)
            grow(parts.predicted, min(<long long>self.decision.cached_tokens, prompt))
            grow(figures.prompt, prompt)
            grow(figures.completion, completion)
        add(parts.kv, -self.cost)
        cdef double tokens = prompt + completion
        charge(parts.queue, identity, tokens - self.cost)
        if self.key is not None:
            self.key.give_back(self.cost, tokens)
        parts.count(
            identity, self.model, prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion
        )
        if parts.queue.waiting:
            parts.admission.dispatch()

    def keep(self, ids):
        """May the ids of the prompt be kept?"""
        size = self.parts.keep(self.demand, ids)
        self.kept += size
        return size > 0

    # What others say

    def flow(self, paused):
        if self.connection is not None:
            if paused:
                self.connection.pause()
            else:
                self.connection.resume()

    def fail(self, error):
        self.python().fail(error)

    def client_gone(self):
        self.python().client_gone()

    def abort(self, reason):
        """The worker was taken out of rotation, or no longer answers."""
        self.python().abort(reason)

    def expire(self):
        """No byte came in time."""
        self.python().expire()

    cdef _leave_pump(self):
        ride, self.ride = self.ride, None
        if ride is not None:
            ride.end()

    cdef _leave_worker(self):
        worker, self.worker = self.worker, None
        if worker is None or not self.seated:
            return
        self.deadline = INFINITY
        self.seated = False
        worker.leases.discard(self)
        seat(worker.load, -1.0, -self.seat_prefill, -self.seat_kv)

    cdef _close(self):
        """It is over: give back what it held."""
        cdef Parts parts = self.parts
        self.ended = True
        self.stream = None  # it knows us: a cycle that would wait for the collector
        parts.give_back(PyBytes_GET_SIZE(self.data) - self.body_at)
        if self.kept:
            parts.forget(self.kept)
        observe(parts.decision, self.decision.seconds)
        parts.remember(
            self.request_id, self.identity.name, self.known.path, self.model, self.exchange.status, 0, 0,
            (self.decision,),
        )
        parts.path.flights.discard(self)
        router = parts.router
        cdef long running = router.in_flight - 1
        router.in_flight = running
        if running == 0:
            router.idle.set()

    cdef python(self):
        """From here on a Flight in the same state is what this was, for everybody who knows it."""
        if self.flight is not None:
            return self.flight
        path, router = self.parts.path, self.parts.router
        decision, worker = self.decision, self.worker
        ticket = Ticket(router.admission, self.identity, self.demand, self.model, True)
        ticket.arrived = self.arrived
        ticket.prefill = self.tokens
        ticket._first = self.first
        ticket._key = self.key
        call = Call(
            exchange=self.exchange, route=self.known.route, request_id=self.request_id, arrived=self.arrived,
            body=self.body(), fields=self.given, model=self.model, streams=True, serving=self.serving,
            job_key=router.config.job_key, user=self.identity.name,
        )
        call.ticket = ticket
        if decision is not None:
            call.decisions.append(decision)
        flight = self.flight = Flight(path, call, self.demand, self.asked, ticket, self.prefill)
        if self.fields is not None:
            flight._fields = self.fields
        flight._decision, flight._worker, flight._connection = decision, worker, self.connection
        flight._fresh, flight._request, flight._computes = self.fresh, self.request, self.computes
        flight._status, flight._headers = self.status, self.headers
        flight._held, flight._stream, flight._streams = self.held, self.stream, self.streams
        flight._first_at, flight._kept, flight._ride = self.first_at, self.kept, self.ride
        flight.since, flight.deadline, flight._ended = self.since, self.deadline, self.ended
        if self.seated:
            seat = flight._seat = Seat(worker, self.demand, decision)
            seat._running, seat.since, seat._prefill_tokens = flight, self.since, self.seat_prefill
            worker.leases.discard(self)
            worker.leases.add(flight)
        if self.stream is not None:
            self.stream.prompt_ids_to(flight.keep)
        path.flights.discard(self)
        path.flights.add(flight)
        if self.exchange.owner is self:
            self.exchange.owner = flight
        if self.connection is not None and self.connection.reader is self:
            self.connection.hand_over(flight)
        self.worker = self.connection = self.stream = self.ride = None
        return flight
