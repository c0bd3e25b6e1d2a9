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


cdef class Parts:
    # Of the router, and of what it consists of.
    cdef object router
    cdef object path
    cdef object admission
    cdef object queue
    cdef object budgets
    cdef object engine
    cdef object keyring
    cdef object runner
    cdef object prompts
    cdef object account
    cdef object job_key
    cdef double first_byte_timeout
    cdef long long max_body
    # Figures.
    cdef object prefill
    cdef object kv
    cdef object computed
    cdef object queued
    cdef object ttft
    cdef object latency
    cdef object decision
    cdef object legs
    cdef object prompt
    cdef object generated
    cdef object predicted
    # Methods.
    cdef object time
    cdef object place
    cdef object placed
    cdef object take
    cdef object lacking
    cdef object hold
    cdef object give_back
    cdef object keep
    cdef object forget
    cdef object learn
    cdef object count
    cdef object remember


cdef add(cell, double amount)
cdef seat(load, double in_flight, double prefill_tokens, double kv_tokens)
cdef grow(child, long long by)
cdef charge(queue, identity, double cost)
cdef observe(histogram, double value)
cdef tuple counts(usage)
cdef tuple told(headers)
cdef bytes opening(bytes head, bytes given, bytes text, bint last)
cdef tuple message(bytes before, bytes given, bytes after, bytes data, ssize_t start, bytes added, bint more)
