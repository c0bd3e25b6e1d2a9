# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, nonecheck=True
"""Carries running streams from socket to socket, all that have something in one call.

While a stream is nothing but one usual event after another (see `generated.py`, whose `_event` this repeats),
no Python runs for it: its bytes are received, looked through, and sent on. Anything else - an unusual event, a
piece that ends inside a chunk, a client that reads too slowly, the end - puts the stream back where it came
from, with the bytes that were received and not understood, and those that could not be sent.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy
from posix.unistd cimport close

import os

from .epoll cimport (
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN, epoll_create1, epoll_ctl, epoll_event, epoll_wait,
)
from .gate cimport Gate, watch

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int socket, void *data, size_t size, int flags)
    ssize_t send(int socket, const void *data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<string.h>" nogil:
    void *memmem(const void *text, size_t size, const void *mark, size_t mark_size)

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the source this was compiled from."""

cdef enum:
    MOST_READY = 128
    RECEIVE = 65536
    FRAMED = 73728  # a chunk of 30 bytes or more grows by two at most: `[1]` becomes `null`

cdef struct Kept:
    char *data
    ssize_t size
    ssize_t room

cdef struct Parts:
    # Of one event.
    const char *text
    ssize_t text_size
    const char *ids
    ssize_t ids_size

# Shared by all lines: one is looked at at a time.
cdef char received[RECEIVE]
cdef char framed[FRAMED]


cdef class Line:
    """One stream's way from an engine to a client."""

    cdef int _source
    cdef int _sink
    cdef object _back
    cdef bytes _unread
    cdef bytes _unsent
    cdef bytes _mark
    cdef bytes _close
    cdef bint _keep_ids
    # The account of what was carried, as GeneratedStream keeps it; see settle().
    cdef readonly ssize_t pieces
    cdef ssize_t _events
    cdef ssize_t _reached
    cdef bint _single
    cdef Kept _ids
    cdef Kept _text
    # How the last event began, up to its text, went on behind it, up to its ids, and ended: the next one is
    # nearly always the same but for these.
    cdef Kept _head
    cdef Kept _middle
    cdef Kept _tail

    def __init__(self, int source, int sink, object back, *, bytes mark, bytes close, bint keep_ids):
        """`source` and `sink` are sockets; a stream's events begin and end their texts with `mark` and `close`.
        `back(unread, unsent)` is called when the stream leaves."""
        self._source = source
        self._sink = sink
        self._back = back
        self._mark = mark
        self._close = close
        self._keep_ids = keep_ids
        self._reached = -1

    def __dealloc__(self):
        free(self._ids.data)
        free(self._text.data)
        free(self._head.data)
        free(self._middle.data)
        free(self._tail.data)

    def settle(self, stream):
        """Add what was carried to the account of a GeneratedStream."""
        had = len(stream.ids)
        stream.ids += self._ids.data[:self._ids.size] if self._ids.size else b""
        stream.text += self._text.data[:self._text.size] if self._text.size else b""
        stream.events += self._events
        stream.pieces += self.pieces
        if self._reached >= 0:
            stream.reached = had + self._reached
            stream.single = self._single
        self._ids.size = self._text.size = self._events = self.pieces = 0
        self._reached = -1

    cdef bint _run(self) except *:
        """Carry what there is. False: the stream leaves."""
        cdef ssize_t size = recv(self._source, received, RECEIVE, MSG_DONTWAIT)
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return True
        if size <= 0:
            # Whoever reads next will see the same.
            self._unread = self._unsent = b""
            return False
        cdef ssize_t at = 0, end, out = 0, sent = 0
        while at < size:
            end = self._chunk(received + at, size - at, framed + out, &out)
            if end == 0:
                break
            at += end
            self._events += 1
        if out:
            self.pieces += 1
            sent = send(self._sink, framed, out, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                # Full, or gone: who writes next will see.
                sent = 0
        if at == size and sent == out:
            return True
        self._unread = PyBytes_FromStringAndSize(received + at, size - at)
        self._unsent = PyBytes_FromStringAndSize(framed + sent, out - sent)
        return False

    cdef ssize_t _chunk(self, const char *data, ssize_t size, char *to, ssize_t *out) except -1:
        """Frame the chunk that `data` begins with anew at `to`; returns its size, 0 for an unusual one."""
        cdef ssize_t at = 0, length = 0
        cdef int digit
        while at < size and at < 6 and data[at] != 13:
            digit = data[at]
            if 48 <= digit <= 57:
                digit -= 48
            elif 97 <= digit <= 102:
                digit -= 87
            elif 65 <= digit <= 70:
                digit -= 55
            else:
                return 0
            length = length * 16 + digit
            at += 1
        if at == 0 or at + 2 > size or data[at] != 13 or data[at + 1] != 10:
            return 0
        cdef const char *event = data + at + 2
        cdef ssize_t whole = at + 2 + length + 2
        if length < 30 or whole > size or event[length] != 13 or event[length + 1] != 10:
            return 0
        cdef Parts parts
        if not self._again(event, length, &parts) and not self._look(event, length, &parts):
            return 0
        cdef ssize_t count = 0
        if parts.ids != NULL:
            count = 1 + _count(parts.ids, parts.ids_size)
            _append(&self._ids, parts.ids, parts.ids_size)
            _append(&self._ids, b",", 1)
        if parts.text_size:
            _append(&self._text, parts.text, parts.text_size)
            if parts.ids != NULL:
                self._reached = self._ids.size
                self._single = count == 1
        if parts.ids == NULL or self._keep_ids:
            memcpy(to, data, whole)
            out[0] += whole
            return whole
        # `null` instead of the list, as the engine writes where it was not asked for ids.
        cdef const char *closing = parts.ids + parts.ids_size
        cdef ssize_t before = (parts.ids - 1) - event, after = event + length - (closing + 1)
        cdef ssize_t head = _hex(before + 4 + after, to)
        memcpy(to + head, event, before)
        memcpy(to + head + before, b"null", 4)
        memcpy(to + head + before + 4, closing + 1, after + 2)
        out[0] += head + before + 4 + after + 2
        return whole

    cdef bint _again(self, const char *event, ssize_t length, Parts *parts) noexcept:
        """Is it the last event but for its text and ids?"""
        cdef ssize_t head = self._head.size, middle = self._middle.size, tail = self._tail.size
        if head == 0 or length < head + middle + tail or memcmp(event, self._head.data, head) != 0:
            return False
        cdef const char *end = event + length - tail
        if memcmp(end, self._tail.data, tail) != 0:
            return False
        parts.text = event + head
        cdef const char *stop = <const char *>memmem(parts.text, end - parts.text, self._middle.data, middle)
        if stop == NULL:
            return False
        parts.text_size = stop - parts.text
        parts.ids = stop + middle
        parts.ids_size = end - parts.ids
        return _digits(parts.ids, parts.ids_size)

    cdef bint _look(self, const char *event, ssize_t length, Parts *parts) except -1:
        """Is it a usual event: text, the reason to end that is not there, and the ids?"""
        cdef const char *end = event + length
        self._head.size = 0
        if <const char *>memmem(event, length, b"\n\n", 2) != end - 2 or memcmp(event, b"data: {", 7) != 0:
            return False
        cdef const char *stop_at = end
        parts.ids = <const char *>memmem(event, length, b'"token_ids":[', 13)
        if parts.ids != NULL:
            stop_at = parts.ids
            parts.ids += 13
        parts.text = <const char *>memmem(event, stop_at - event, <char *>self._mark, len(self._mark))
        if parts.text == NULL:
            return False
        parts.text += len(self._mark)
        cdef const char *stop = <const char *>memmem(
            parts.text, stop_at - parts.text, <char *>self._close, len(self._close)
        )
        if stop == NULL or memmem(stop, stop_at - stop, b'"finish_reason":null', 20) == NULL:
            return False
        parts.text_size = stop - parts.text
        if parts.ids == NULL:
            return True
        cdef const char *closing = <const char *>memchr(parts.ids, 93, end - parts.ids)
        if closing == NULL or not _digits(parts.ids, closing - parts.ids):
            return False
        parts.ids_size = closing - parts.ids
        self._middle.size = self._tail.size = 0
        _append(&self._head, event, parts.text - event)
        _append(&self._middle, stop, parts.ids - stop)
        _append(&self._tail, closing, end - closing)
        return True


cdef bint _digits(const char *ids, ssize_t size) noexcept:
    """Numbers with commas between them, and not none."""
    cdef ssize_t at
    for at in range(size):
        if not (48 <= ids[at] <= 57 or ids[at] == 44):
            return False
    return size > 0


cdef ssize_t _count(const char *ids, ssize_t size) noexcept:
    """Commas."""
    cdef ssize_t found = 0, at
    for at in range(size):
        if ids[at] == 44:
            found += 1
    return found


cdef int _append(Kept *to, const char *data, ssize_t size) except -1:
    cdef char *grown
    if to.size + size > to.room:
        grown = <char *>realloc(to.data, 2 * (to.size + size) + 64)
        if grown == NULL:
            raise MemoryError
        to.data = grown
        to.room = 2 * (to.size + size) + 64
    memcpy(to.data + to.size, data, size)
    to.size += size
    return 0


cdef ssize_t _hex(ssize_t number, char *to) noexcept:
    """A chunk's size line."""
    cdef ssize_t digits = 1, rest = number >> 4, at
    while rest:
        digits += 1
        rest >>= 4
    for at in range(digits):
        to[digits - 1 - at] = b"0123456789abcdef"[(number >> (4 * at)) & 15]
    to[digits] = 13
    to[digits + 1] = 10
    return digits + 2


cdef class Pump:
    """All running lines of one event loop: `loop.add_reader(pump.fileno(), pump.run)`."""

    cdef int _epoll
    cdef dict _lines
    cdef Gate _gate

    def __init__(self):
        """Raises OSError."""
        self._lines = {}
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise OSError(errno, os.strerror(errno))
        self._gate = Gate(self._epoll)

    def __dealloc__(self):
        if self._epoll >= 0:
            close(self._epoll)

    def __len__(self):
        return len(self._lines)

    def fileno(self):
        return self._gate.fileno()

    def add(self, Line line):
        """From now on it is carried here, and nobody else may read its source. Raises OSError."""
        watch(self._epoll, EPOLL_CTL_ADD, line._source, EPOLLIN)
        self._lines[line._source] = line

    def remove(self, Line line):
        """Leave it alone; without a word to it."""
        cdef epoll_event event
        if self._lines.get(line._source) is line:
            del self._lines[line._source]
            epoll_ctl(self._epoll, EPOLL_CTL_DEL, line._source, &event)

    def run(self):
        """Carry all that has come."""
        cdef epoll_event events[MOST_READY]
        cdef int found = epoll_wait(self._epoll, events, MOST_READY, 0), at
        cdef Line line
        for at in range(found):
            line = self._lines.get(events[at].data.fd)
            if line is None:
                continue
            if not line._run():
                # First: its connection may carry the next stream before `back` returns.
                self.remove(line)
                line._back(line._unread, line._unsent)
        self._gate.came(found)
