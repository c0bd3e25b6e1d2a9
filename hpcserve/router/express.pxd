from .known cimport Known, Parts


cdef class Express:
    # What it was made with.
    cdef Parts parts
    cdef Known known
    cdef object exchange
    cdef object wire
    cdef str request_id
    # The body is `data` from `body_at` on.
    cdef bytes data
    cdef ssize_t body_at
    cdef dict given
    cdef str model
    cdef object serving
    cdef object answering
    cdef object prefill
    cdef object identity
    cdef object key
    cdef object demand
    cdef object asked
    cdef double arrived
    cdef double cost
    cdef double tokens
    # Where it is.
    cdef object decision
    # Who computes the prompt for another; None: nobody does.
    cdef object giver
    cdef object uncached
    cdef object worker
    cdef object connection
    cdef object request
    cdef object headers
    cdef object stream
    cdef object ride
    cdef dict fields
    cdef list held
    cdef int status
    cdef bint fresh
    cdef bint streams
    cdef bint computes
    cdef bint first
    cdef object flight
    cdef bint seated
    cdef bint ended
    cdef double seat_prefill
    cdef double seat_kv
    cdef double first_at
    cdef ssize_t kept
    cdef readonly double since
    cdef readonly double deadline

    cdef bytes body(self)
    cdef start(self)
    cdef _place(self)
    cdef _ask(self, worker, bytes data, ssize_t start, bytes added, double now)
    cdef _take(self, bytes data, ssize_t start, ssize_t stop, bint last)
    cdef _hand_over(self, bytes data, bint last)
    cdef _first_byte(self, worker)
    cdef _collect(self, worker, bytes data, bint last)
    cdef _pass_on(self, bytes data, ssize_t start, ssize_t stop, bint last)
    cdef _begin(self, stream, bint last)
    cdef _complete(self, stream)
    cdef _computed(self)
    cdef _served(self, stream)
    cdef _leave_worker(self)
    cdef _leave_pump(self)
    cdef _close(self)
    cdef python(self)
