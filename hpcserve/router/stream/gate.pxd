from libc.stdint cimport uint32_t

cdef class Gate:
    cdef int _epoll, _timer, _behind
    cdef bint _shut
    cdef long long _last  # ns
    cdef long _gathered

    cdef came(self, int found)
    cdef _set(self, long ns)

cdef watch(int epoll, int operation, int fd, uint32_t events)
