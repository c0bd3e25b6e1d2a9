# cython: language_level=3, boundscheck=False, wraparound=False
"""Long bodies read: `call.members()` and `prompt.chain()`, which are the reference; `tests/router/test_reading.py`
compares.

Whether a body is JSON is msgspec's to say. But it looks at one byte after the other, and nearly all of a long
prompt is plain text inside of strings, where nothing can be wrong: such stretches are found many bytes at once,
and msgspec reads the body without them. What it says of that holds for the whole.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy

import msgspec
from xxhash import xxh3_64_intdigest

from .call import Raw
from .prompt import CHUNK, MOST_CHUNKS

from .kv.marks cimport Chain, new_chain

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif

    #include <string.h>

    typedef signed char hpcserve_block __attribute__((vector_size(16)));

    /* Where the first quote, backslash or control character is from `at` on; `size`: there is none. `high` is
       set below zero once there is a byte above ASCII before. */
    static Py_ssize_t hpcserve_plain(const char *text, Py_ssize_t at, Py_ssize_t size, signed char *high) {
        union { hpcserve_block block; unsigned long long words[2]; } odd, seen = {{0}};
        for (; size - at >= 32; at += 32) {
            hpcserve_block one, other;
            memcpy(&one, text + at, 16);
            memcpy(&other, text + at + 16, 16);
            /* Comparisons are signed: flipped, control characters are the lowest. */
            odd.block = (one == 34) | (one == 92) | ((one ^ -128) < -96)
                | (other == 34) | (other == 92) | ((other ^ -128) < -96);
            if (odd.words[0] | odd.words[1])
                break;
            seen.block |= one | other;
        }
        if ((seen.words[0] | seen.words[1]) & 0x8080808080808080ULL)
            *high = -1;
        for (; at < size && text[at] != 34 && text[at] != 92 && (unsigned char)text[at] >= 32; at++)
            *high |= text[at];
        return at;
    }
    """
    const char *HPCSERVE_SOURCE
    ssize_t hpcserve_plain(const char *text, ssize_t at, ssize_t size, signed char *high) noexcept

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef object _decode = msgspec.json.Decoder().decode
cdef object _fields = msgspec.json.Decoder(Raw).decode
cdef object _raw = msgspec.Raw
cdef object _hash = xxh3_64_intdigest
cdef ssize_t _chunk = CHUNK, _most_chunks = MOST_CHUNKS
cdef enum:
    MOST_DIGITS = 15
    SHORTEST = 128    # stretch to leave out
    STAYS = 8         # of its beginning: what belongs to an escape before it
    MOST_CUTS = 256   # the rest is msgspec's

cdef struct Cut:
    # What is left out.
    ssize_t start
    ssize_t stop


cdef long long whole_number(raw) except -2:
    """A JSON number that is whole and not below zero; -1: it is something else."""
    cdef Py_buffer view
    cdef long long number = 0
    cdef ssize_t at
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    cdef const char *text = <const char *>view.buf
    if 0 < view.len <= MOST_DIGITS:
        for at in range(view.len):
            if not 48 <= text[at] <= 57:
                break
            number = number * 10 + text[at] - 48
        else:
            PyBuffer_Release(&view)
            return number
    PyBuffer_Release(&view)
    value = _decode(raw)
    return value if type(value) is int and 0 <= value < 1 << 62 else -1


cpdef dict members(bytes data, ssize_t start):
    """As `call.members()` of `data[start:]`. Raises what its parts raise."""
    cdef dict found = _long(data, start) if PyBytes_GET_SIZE(data) - start >= LONG else None
    cdef bytes body
    if found is None:
        body = data[start:]
        if not body.isascii():
            body.decode()
        found = _fields(body)
    cdef Py_buffer view
    cdef bint number
    for raw in found.values():
        PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
        number = 0 < view.len < 400 and 44 < (<const char *>view.buf)[0] < 58
        PyBuffer_Release(&view)
        if number:
            whole_number(raw)
    return found


cdef dict _long(bytes data, ssize_t start):
    """The members as msgspec has them, which has not read all of it; None: it must."""
    cdef Cut cuts[MOST_CUTS]
    cdef signed char high = 0
    cdef const char *text = PyBytes_AS_STRING(data) + start
    cdef ssize_t at = 0, size = PyBytes_GET_SIZE(data) - start
    cdef ssize_t count = _cuts(text, size, cuts, &high)
    if count == 0:
        return None
    if high < 0:
        data[start:].decode()
    cdef ssize_t left = size, cut
    for cut in range(count):
        left -= cuts[cut].stop - cuts[cut].start
    cdef bytes short = PyBytes_FromStringAndSize(NULL, left)
    cdef char *to = PyBytes_AS_STRING(short)
    for cut in range(count):
        memcpy(to, text + at, cuts[cut].start - at)
        to += cuts[cut].start - at
        at = cuts[cut].stop
    memcpy(to, text + at, size - at)
    cdef dict found = _fields(short)
    # What it found is put back to where it is in `data`.
    cdef Py_buffer view
    cdef ssize_t begin, end, gone, gone_before
    whole = None
    for name, raw in list(found.items()):
        PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
        begin = <const char *>view.buf - PyBytes_AS_STRING(short)
        end = begin + view.len
        PyBuffer_Release(&view)
        if not 0 <= begin <= end <= left:
            return None
        gone = gone_before = 0
        for cut in range(count):
            if cuts[cut].start - gone >= end:
                break
            if cuts[cut].start - gone < begin:
                gone_before += cuts[cut].stop - cuts[cut].start
            gone += cuts[cut].stop - cuts[cut].start
        if gone != gone_before:
            if whole is None:
                whole = memoryview(data)
            found[name] = _raw(whole[start + begin + gone_before:start + end + gone])
    return found


cdef ssize_t _cuts(const char *text, ssize_t size, Cut *cuts, signed char *high) noexcept:
    """Which stretches of strings to leave out; returns how many, 0 also where one is in a name."""
    cdef ssize_t at = 0, stop, count = 0, before
    cdef const char *quote
    while at < size:
        # Between strings nothing is left out: whatever stands there, msgspec reads it.
        quote = <const char *>memchr(text + at, 34, size - at)
        if quote == NULL:
            break
        at = quote + 1 - text
        before = count
        while at < size:
            stop = hpcserve_plain(text, at, size, high)
            if stop - at >= SHORTEST and count < MOST_CUTS:
                cuts[count].start = at + STAYS
                cuts[count].stop = stop
                count += 1
            at = stop + 1
            if stop == size or text[stop] == 34:
                break
            if text[stop] == 92:
                at += 1
        if count != before:
            stop = at
            while stop < size and text[stop] in (32, 9, 10, 13):
                stop += 1
            if stop < size and text[stop] == 58:
                return 0
    return count


cdef class _Window:
    """A part of a text, for who wants an object."""

    cdef const char *text

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.text, _chunk, True, flags)


cdef Chain links(const char *text, ssize_t size, seed):
    """As `prompt.chain()`."""
    cdef ssize_t count = size // _chunk, at
    if count > _most_chunks:
        count = _most_chunks
    cdef Chain chain = new_chain(count)
    cdef _Window window = _Window.__new__(_Window)
    for at in range(count):
        window.text = text + at * _chunk
        seed = _hash(window, seed)
        chain.chunks[at] = seed
    return chain


def chain(data, seed):
    """As `prompt.chain()`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return links(<const char *>view.buf, view.len, seed)
    finally:
        PyBuffer_Release(&view)
