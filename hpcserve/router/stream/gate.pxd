cdef class Gate:
    cdef int _epoll, _timer, _behind
    cdef bint _shut
    cdef long long _last  # ns
    cdef long _gathered

    cdef came(self, int found)
    cdef _set(self, long ns)
