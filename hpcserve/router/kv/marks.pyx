# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Prompts' chunks and where they are, compiled: `Marks` and `shared()` of `predicted.py`, which is the reference, and
`Chain`, which is what the compiled way has for a tuple of chunks. `tests/router/kv/test_predicted.py` compares.

A long prompt has a hundred chunks, and each of them as an int in a dict is in another place of memory. Here they lie side
by side, and in a table of two words each.
"""

from cpython.object cimport Py_EQ, Py_NE, PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

import os

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE
    void fetch "__builtin_prefetch"(const void *place) noexcept

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef enum:
    FIRST_BITS = 10  # of a new table's size

# Nobody outside knows which chunks meet in the table.
cdef uint64_t _mixed = int.from_bytes(os.urandom(8), "little") | 1


cdef Chain new_chain(ssize_t size):
    """Its chunks are to be written by the caller."""
    cdef Chain made = Chain.__new__(Chain)
    made.chunks = <uint64_t *>malloc((size or 1) * sizeof(uint64_t))
    if made.chunks == NULL:
        raise MemoryError
    made.size = size
    return made


cdef Chain _chain(given):
    if type(given) is Chain:
        return <Chain>given
    cdef ssize_t at = 0
    cdef Chain made = new_chain(len(given))
    for chunk in given:
        made.chunks[at] = chunk
        at += 1
    return made


cdef class Chain:
    """A sequence of 64-bit chunks. `links()` of reading.pyx makes them."""

    def __init__(self, chunks):
        """Raises OverflowError for what has more than 64 bits."""
        cdef Chain made = _chain(tuple(chunks))
        self.chunks, made.chunks = made.chunks, self.chunks
        self.size = made.size

    def __dealloc__(self):
        free(self.chunks)

    def __len__(self):
        return self.size

    def __getitem__(self, place):
        cdef ssize_t at, stop
        cdef Chain part
        if type(place) is slice:
            at, stop, step = (<slice>place).indices(self.size)
            if step != 1:
                raise ValueError("a part of a chain is without gaps")
            # A copy: a short part must not keep all of a long chain.
            part = new_chain(max(stop - at, 0))
            memcpy(part.chunks, self.chunks + at, part.size * sizeof(uint64_t))
            return part
        at = place
        if at < 0:
            at += self.size
        if not 0 <= at < self.size:
            raise IndexError(place)
        return self.chunks[at]

    def __iter__(self):
        cdef ssize_t at
        for at in range(self.size):
            yield self.chunks[at]

    def __richcmp__(self, other, int operation):
        if operation not in (Py_EQ, Py_NE) or type(other) not in (Chain, tuple):
            return NotImplemented
        cdef Chain own = self, theirs
        cdef bint same = len(other) == own.size
        if same:
            theirs = _chain(other)
            same = memcmp(own.chunks, theirs.chunks, own.size * sizeof(uint64_t)) == 0
        return same == (operation == Py_EQ)

    def __hash__(self):
        return hash(tuple(self))

    def __repr__(self):
        return repr(tuple(self))


def shared(run, chain, ssize_t start):
    """As `predicted.shared()`."""
    cdef Chain one = _chain(run), other = _chain(chain)
    cdef ssize_t at = 0, most = min(one.size, other.size - start)
    while at < most and one.chunks[at] == other.chunks[start + at]:
        at += 1
    return at


cdef struct Entry:
    uint64_t chunk
    # 0: there is none. Odd: twice the number of the only worker, and one. Else where an int with a bit for each lies.
    uint64_t workers


cdef class Marks:
    """Chunk -> which workers it is marked for, by number."""

    cdef Entry *_entries
    cdef int _bits
    cdef ssize_t _size

    def __cinit__(self):
        self._bits = FIRST_BITS
        self._entries = <Entry *>calloc(1 << self._bits, sizeof(Entry))
        if self._entries == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef ssize_t at
        if self._entries != NULL:
            for at in range(1 << self._bits):
                _let_go(self._entries[at].workers)
            free(self._entries)

    def __len__(self):
        return self._size

    def items(self):
        """As (chunk, mask)."""
        return [
            (self._entries[at].chunk, _mask(self._entries[at].workers))
            for at in range(1 << self._bits) if self._entries[at].workers
        ]

    def get(self, uint64_t chunk, otherwise=0):
        cdef Entry *found = self._find(chunk)
        return _mask(found.workers) if found.workers else otherwise

    def leading(self, chain, number, ssize_t most):
        cdef Chain given = _chain(chain)
        cdef ssize_t worker = -1 if number is None else number, low = 1, high = most - 1, middle
        if not most or not self._has(given.chunks[0], worker):
            return 0
        if self._has(given.chunks[most - 1], worker):
            return most
        while low < high:
            middle = (low + high) // 2
            if self._has(given.chunks[middle], worker):
                low = middle + 1
            else:
                high = middle
        return low

    def mark(self, chain, ssize_t start, ssize_t number):
        cdef Chain given = _chain(chain)
        cdef ssize_t at, added = 0
        cdef Entry *found
        self._fetch(given, start)
        for at in range(start, given.size):
            found = self._find(given.chunks[at])
            if not found.workers:
                found.chunk, found.workers = given.chunks[at], _only(number)
                self._size += 1
                added += 1
                if self._size * 3 >= 2 << self._bits:
                    self._grow()
            elif not _is_in(found.workers, number):
                self._put(found, _mask(found.workers) | (1 << <object>number))
                added += 1
        return added

    def unmark(self, chain, ssize_t start, ssize_t number):
        cdef Chain given = _chain(chain)
        cdef ssize_t at, had = 0
        cdef Entry *found
        self._fetch(given, start)
        for at in range(start, given.size):
            found = self._find(given.chunks[at])
            if found.workers and _is_in(found.workers, number):
                had += 1
                if found.workers & 1:
                    self._remove(found - self._entries)
                else:
                    self._put(found, _mask(found.workers) & ~(1 << <object>number))
        return had

    cdef bint _has(self, uint64_t chunk, ssize_t number) except -1:
        cdef Entry *found = self._find(chunk)
        return found.workers != 0 and (number < 0 or _is_in(found.workers, number))

    cdef inline uint64_t _home(self, uint64_t chunk) noexcept:
        return (chunk * _mixed) >> (64 - self._bits)

    cdef void _fetch(self, Chain given, ssize_t start) noexcept:
        """Begin to load all places of the chunks from `start` on, which takes as long as to load a few."""
        cdef ssize_t at
        for at in range(start, given.size):
            fetch(self._entries + self._home(given.chunks[at]))

    cdef Entry *_find(self, uint64_t chunk) noexcept:
        """Where it is, or would be."""
        cdef uint64_t last = (<uint64_t>1 << self._bits) - 1, at = self._home(chunk)
        while self._entries[at].workers and self._entries[at].chunk != chunk:
            at = (at + 1) & last
        return self._entries + at

    cdef _put(self, Entry *at, mask):
        """`mask` has a bit at least."""
        cdef uint64_t before = at.workers
        if mask & (mask - 1):
            Py_INCREF(mask)
            at.workers = <uint64_t><PyObject *>mask
        else:
            at.workers = _only(mask.bit_length() - 1)
        _let_go(before)

    cdef void _remove(self, uint64_t hole) noexcept:
        """What stands behind it, and was not where it belongs, moves up."""
        cdef uint64_t last = (<uint64_t>1 << self._bits) - 1, at = hole, home
        while True:
            at = (at + 1) & last
            if not self._entries[at].workers:
                break
            home = self._home(self._entries[at].chunk)
            if ((at - home) & last) >= ((at - hole) & last):
                self._entries[hole] = self._entries[at]
                hole = at
        self._entries[hole].workers = 0
        self._size -= 1

    cdef _grow(self):
        cdef Entry *old = self._entries
        cdef Entry *made = <Entry *>calloc(2 << self._bits, sizeof(Entry))
        cdef ssize_t at, count = 1 << self._bits
        if made == NULL:
            raise MemoryError
        self._entries = made
        self._bits += 1
        for at in range(count):
            if old[at].workers:
                self._find(old[at].chunk)[0] = old[at]
        free(old)


cdef inline uint64_t _only(ssize_t number) noexcept:
    return (<uint64_t>number << 1) | 1


cdef inline bint _is_in(uint64_t workers, ssize_t number) except -1:
    if workers & 1:
        return workers == _only(number)
    return (<object><PyObject *>workers >> <object>number) & 1


cdef inline object _mask(uint64_t workers):
    if workers & 1:
        return 1 << <object>(<ssize_t>(workers >> 1))
    return <object><PyObject *>workers


cdef inline void _let_go(uint64_t workers) noexcept:
    if workers and not workers & 1:
        Py_DECREF(<object><PyObject *>workers)
