# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Heads that were read before: who keeps a connection sends the same head again, but for its Content-Length.

A head is known by its bytes, all of them, without the digits of its Content-Length. What the strict parser made
of it once holds for every other head with these bytes: nothing is read anew but the digits. Any other head is
the parser's. `heads.py` is what others see of it; `tests/http/test_heads.py` compares it with the parser.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy

cdef extern from "<string.h>" nogil:
    void *memmem(const void *text, size_t size, const void *mark, size_t mark_size)

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *one, const char *other, size_t size)

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the file this was compiled from."""

cdef enum:
    LONGEST = 4096  # a head; longer ones are seldom, and would fill memory
    MOST_DIGITS = 15
    MOST_ONCE = 4096

cdef struct Place:
    # In a message that begins with a whole head.
    ssize_t end     # of the head, with its empty line
    ssize_t digits  # where those of Content-Length are; -1: it has none
    ssize_t after   # where they end


cdef int _look(const char *data, ssize_t size, Place *place) noexcept:
    """0: no whole head that could be known."""
    cdef const char *stop = <const char *>memmem(data, size if size < LONGEST else LONGEST, b"\r\n\r\n", 4)
    if stop == NULL:
        return 0
    cdef const char *line = data
    cdef const char *at
    place.end = stop + 4 - data
    place.digits = place.after = -1
    while True:
        line = <const char *>memchr(line, 10, stop + 2 - line)
        if line == NULL:
            return 1
        line += 1
        if (line[0] == 99 or line[0] == 67) and stop - line > 15 and strncasecmp(line, b"content-length:", 15) == 0:
            if place.digits >= 0:
                return 0
            at = line + 15
            while at[0] == 32:
                at += 1
            place.digits = at - data
            while 48 <= at[0] <= 57:
                at += 1
            place.after = at - data
            if not 0 < place.after - place.digits <= MOST_DIGITS or at[0] != 13:
                return 0


cdef bytes _key(const char *data, Place *place):
    """The head without its Content-Length's digits."""
    if place.digits < 0:
        return PyBytes_FromStringAndSize(data, place.end)
    cdef ssize_t gap = place.after - place.digits
    cdef bytes key = PyBytes_FromStringAndSize(NULL, place.end - gap)
    cdef char *to = PyBytes_AS_STRING(key)
    memcpy(to, data, place.digits)
    memcpy(to + place.digits, data + place.after, place.end - place.after)
    return key


cdef ssize_t _number(const char *data, Place *place) noexcept:
    """Content-Length; -1 without one."""
    cdef ssize_t number = 0, at
    if place.digits < 0:
        return -1
    for at in range(place.digits, place.after):
        number = number * 10 + data[at] - 48
    return number


cdef class Heads:
    """What was made of heads, by their bytes. `most` of them are kept; then all are forgotten."""

    cdef dict _known
    cdef set _once
    cdef ssize_t _most

    def __init__(self, ssize_t most=512):
        self._known = {}
        self._once = set()
        self._most = most

    def __len__(self):
        return len(self._known)

    def find(self, bytes data):
        """(what was kept, where the head ends, Content-Length or -1); None for a head that isn't known."""
        cdef Place place
        cdef const char *text = PyBytes_AS_STRING(data)
        if not self._known or not _look(text, PyBytes_GET_SIZE(data), &place):
            return None
        known = self._known.get(_key(text, &place))
        return None if known is None else (known, place.end, _number(text, &place))

    def again(self, bytes data):
        """Has this head come before, and is it worth `keep()`? Many come once, as those with an id do."""
        cdef Place place
        cdef const char *text = PyBytes_AS_STRING(data)
        if not _look(text, PyBytes_GET_SIZE(data), &place):
            return False
        # Keyed hashes, new in every process: nobody can choose heads that collide, and it were no harm.
        mark = hash(_key(text, &place))
        if mark in self._once:
            self._once.discard(mark)
            return True
        if len(self._once) >= MOST_ONCE:
            self._once.clear()
        self._once.add(mark)
        return False

    def keep(self, bytes data, headers, known):
        """The strict parser has read `headers` in the head that `data` begins with: from now on `find()` gives
        `known` for it. False: the head is not simply one line after the other, and is not kept."""
        cdef Place place
        cdef const char *text = PyBytes_AS_STRING(data)
        if not _look(text, PyBytes_GET_SIZE(data), &place):
            return False
        lines = data[:place.end - 4].split(b"\r\n")[1:]
        if len(lines) != len(headers):
            return False
        for line, (name, value) in zip(lines, headers):
            found, colon, text_of = line.partition(b":")
            if not colon or found.lower() != name or text_of.strip(b" \t") != value.strip(b" \t"):
                return False
            if b"\n" in line or b"\r" in line:
                return False
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[_key(text, &place)] = known
        return True

    def answer(self, bytes data):
        """(what was kept, bytes, start and stop of the body in them, the head if more is to come), where the head is
        known, and `data` ends with the body's last byte or between two chunks; else None, and the parser must read
        it. Chunks must have their usual form: no extensions, no trailers."""
        cdef Place place
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef ssize_t size = PyBytes_GET_SIZE(data)
        if not self._known or not _look(text, size, &place):
            return None
        known = self._known.get(_key(text, &place))
        if known is None:
            return None
        if place.digits < 0:
            return _chunks(known, data, place.end)
        return (known, data, place.end, size, None) if size - place.end == _number(text, &place) else None

    def rest(self, bytes data):
        """(bytes, start and stop of a piece of the body in them, whether it is the last one) of what follows a chunk;
        None where it does not end with a chunk, or has an unusual form."""
        found = _chunks(None, data, 0)
        return None if found is None else (found[1], found[2], found[3], found[4] is None)


cdef int _hex(char digit) noexcept:
    if 48 <= digit <= 57:
        return digit - 48
    if 97 <= digit <= 102:
        return digit - 87
    if 65 <= digit <= 70:
        return digit - 55
    return -1


cdef tuple _chunks(known, bytes data, ssize_t head):
    """As answer(), of what comes after `head` bytes."""
    cdef const char *text = PyBytes_AS_STRING(data)
    cdef ssize_t end = PyBytes_GET_SIZE(data), at = head, start = head, stop = head, count = 0, size, digits
    cdef list pieces = None
    cdef bytes body = data
    cdef bytes begun = None
    while True:
        if at == end and count > 0:
            begun = data[:head]
            break
        size = digits = 0
        while at < end and digits < 8 and _hex(text[at]) >= 0:
            size = size * 16 + _hex(text[at])
            at += 1
            digits += 1
        if digits == 0 or at + 4 > end or text[at] != 13 or text[at + 1] != 10:
            return None
        at += 2
        if at + size + 2 > end or text[at + size] != 13 or text[at + size + 1] != 10:
            return None
        if size == 0:
            if at + 2 != end:
                return None
            break
        # One chunk stays where it is.
        count += 1
        if count == 2:
            pieces = [PyBytes_FromStringAndSize(text + start, stop - start)]
        if count > 1:
            pieces.append(PyBytes_FromStringAndSize(text + at, size))
        start, stop = at, at + size
        at += size + 2
    if pieces is not None:
        body = b"".join(pieces)
        start, stop = 0, PyBytes_GET_SIZE(body)
    return known, body, start, stop, begun
