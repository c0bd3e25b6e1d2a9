from .kv.marks cimport Chain

cdef enum:
    LONG = 4096  # a body that is worth a look before msgspec's, and that is not copied

cdef long long whole_number(raw) except -2
cpdef dict members(bytes data, ssize_t start)
cdef Chain links(const char *text, ssize_t size, seed)
