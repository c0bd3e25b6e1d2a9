from libc.stdint cimport uint64_t

cdef class Chain:
    cdef uint64_t *chunks
    cdef ssize_t size

cdef Chain new_chain(ssize_t size)
