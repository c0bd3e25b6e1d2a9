# cython: language_level=3, boundscheck=False, wraparound=False
"""Loops over a prompt's chunks, compiled: `mark()`, `unmark()` and `leading()` of `predicted.py`, which is the
reference. `tests/router/kv/test_predicted.py` compares them."""

from cpython.dict cimport PyDict_GetItemWithError, PyDict_SetDefault
from cpython.object cimport PyObject

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the file this was compiled from."""


cdef bint _has(dict masks, chunk, bits) except -1:
    cdef PyObject *found = PyDict_GetItemWithError(masks, chunk)
    return found != NULL and (<object>found is bits or (<object>found & bits) != 0)


def leading(dict masks, tuple chain, bits, ssize_t most):
    if not most or not _has(masks, chain[0], bits):
        return 0
    if _has(masks, chain[most - 1], bits):
        return most
    cdef ssize_t low = 1, high = most - 1, middle
    while low < high:
        middle = (low + high) // 2
        if _has(masks, chain[middle], bits):
            low = middle + 1
        else:
            high = middle
    return low


def mark(dict masks, tuple chain, ssize_t start, bit):
    cdef ssize_t at, before = len(masks), joined = 0
    for at in range(start, len(chain)):
        chunk = chain[at]
        holders = <object>PyDict_SetDefault(masks, chunk, bit)
        if holders is not bit and not holders & bit:
            masks[chunk] = holders | bit
            joined += 1
    return len(masks) - before + joined


def unmark(dict masks, tuple chain, ssize_t start, bit):
    cdef ssize_t at, had = 0
    for at in range(start, len(chain)):
        chunk = chain[at]
        holders = masks.pop(chunk, None)
        if holders is None:
            continue
        if holders is bit:
            had += 1
            continue
        if holders & bit:
            had += 1
        rest = holders & ~bit
        if rest:
            masks[chunk] = rest
    return had
