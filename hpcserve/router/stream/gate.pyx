# cython: language_level=3
"""When the pump looks at its streams: at once, or, where many have something, a few thousand times a second.

An engine that writes for a batch of streams sends one chunk after the other, microseconds apart. To be woken up by each of
them costs more than to carry it. So where chunks come closer together than `GATHER`, those after the first wait for each
other that long. Chunks of streams that are few or slow wait for nothing.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t
from posix.unistd cimport close

import os

from .epoll cimport (
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLIN, epoll_create1, epoll_ctl, epoll_event,
)

cdef extern from "<sys/timerfd.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    struct itimerspec:
        timespec it_interval
        timespec it_value
    int CLOCK_MONOTONIC
    int TFD_CLOEXEC
    int TFD_NONBLOCK
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int timer, int flags, const itimerspec *new, itimerspec *old)
    int clock_gettime(int clock, timespec *now)

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef enum:
    GATHER = 250_000  # ns
    WORTH = 4  # chunks that waited: behind the next one more will come as well


cdef class Gate:
    """What the event loop watches of the pump: its streams, or, while it is shut, a clock."""

    def __init__(self, int behind):
        """`behind` becomes readable when there is something to do. Raises OSError."""
        self._behind = behind
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        self._timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self._epoll < 0 or self._timer < 0:
            raise OSError(errno, os.strerror(errno))
        watch(self._epoll, EPOLL_CTL_ADD, behind, EPOLLIN)
        watch(self._epoll, EPOLL_CTL_ADD, self._timer, EPOLLIN)

    def __cinit__(self, *_):
        self._epoll = self._timer = -1

    def __dealloc__(self):
        if self._epoll >= 0:
            close(self._epoll)
        if self._timer >= 0:
            close(self._timer)

    cdef came(self, int found):
        """So many streams had something at this moment: is more to be expected at once?"""
        cdef timespec time
        cdef long long now
        if found <= 0:
            if self._shut:
                self._shut = False
                self._set(0)
                watch(self._epoll, EPOLL_CTL_MOD, self._behind, EPOLLIN)
            return
        clock_gettime(CLOCK_MONOTONIC, &time)
        now = time.tv_sec * 1_000_000_000LL + time.tv_nsec
        if self._shut:
            self._gathered += found
            self._set(GATHER)
        elif self._gathered >= WORTH or now - self._last < GATHER:
            self._shut = True
            self._gathered = 0
            self._set(GATHER)
            watch(self._epoll, EPOLL_CTL_MOD, self._behind, 0)
        self._last = now

    def fileno(self):
        return self._epoll

    cdef _set(self, long ns):
        """Set the clock, which also takes back that it has rung; 0: stop it."""
        cdef itimerspec when
        when.it_interval.tv_sec = when.it_interval.tv_nsec = when.it_value.tv_sec = 0
        when.it_value.tv_nsec = ns
        if timerfd_settime(self._timer, 0, &when, NULL) != 0:
            raise OSError(errno, os.strerror(errno))


cdef watch(int epoll, int operation, int fd, uint32_t events):
    """epoll_ctl(). Raises OSError."""
    cdef epoll_event event
    event.events = events
    event.data.fd = fd
    if epoll_ctl(epoll, operation, fd, &event) != 0:
        raise OSError(errno, os.strerror(errno))
