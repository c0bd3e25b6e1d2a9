cdef class Known:
    cdef readonly object route
    cdef readonly str path
    cdef readonly str target
    cdef readonly list headers
    cdef readonly dict named
    cdef readonly str session
    cdef readonly bint chat
    cdef readonly bint plain
    cdef ssize_t length_at
    cdef object good
    cdef object identity
    cdef object figures
    cdef object answers
    cdef dict legs

    cdef tuple leg(self, worker, job_key, bint encoded)


cdef add(cell, double amount)
cdef seat(load, double in_flight, double prefill_tokens, double kv_tokens)
cdef grow(child, long long by)
cdef charge(queue, identity, double cost)
cdef observe(histogram, double value)
cdef tuple counts(usage)
cdef tuple told(headers)
cdef bytes opening(bytes head, bytes given, bytes text, bint last)
cdef tuple message(bytes before, bytes given, bytes after, bytes data, ssize_t start, bytes added, bint more)
