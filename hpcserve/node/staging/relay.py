"""One node's part in the ring: reads its share, takes what comes, writes both down and passes both on.

Readers, receivers and senders are threads that never wait for one another: what is to be passed on is
sent from the file just written, out of the page cache, so only its number waits in a queue. A ring in
which a full queue stopped the receiver could stand still for ever.

A chunk on the wire is its number, its length, the hash its first reader took, and its bytes. The hash
is looked at on each node before the chunk counts.
"""

from __future__ import annotations

import errno
import os
import queue
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from ...errors import HpcserveError
from .copy import Copy
from .links import LANES, Place, read_exactly
from .schedule import CHUNK, Chunk
from .source import open_source, read_at
from .thread import start
from .trouble import DiskFull, LostNeighbour, NotStaged

_HEAD = struct.Struct("!II16s")
"""Number of the chunk in the schedule, its length, its XXH3-128."""
_END = None
_FILES = 65536
_SHORTER = "a file of the copy became shorter"
_NETWORK = frozenset(
    {
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOBUFS,
        errno.ENOTCONN,
    }
)
"""What a connection fails with, beside those that Python has an exception for."""


class Relay:
    """Run once. `before` and `after` are the lanes from and to the neighbours; empty in a ring of one."""

    def __init__(
        self,
        copy: Copy,
        held: frozenset[int],
        chunks: Sequence[Chunk],
        place: Place,
        before: Sequence[socket.socket],
        after: Sequence[socket.socket],
    ) -> None:
        self._copy = copy
        self._held = held
        self._chunks = chunks
        self._place = place
        self._before = before
        self._after = after
        files = copy.listing.files
        self.present = sum(files[index].size for index in held)
        """Bytes of the model that are on this node."""
        self.read = 0
        """Bytes that this node read from the shared file system."""
        self.received = 0
        """Bytes that came from the node before."""
        self._lock = threading.Lock()
        self._error: HpcserveError | None = None
        self._stopped = False
        self._digests: dict[int, bytes] = {}
        self._left = {index: 0 for index in range(len(files)) if index not in held}
        """File -> chunks of it that are still to come."""
        for chunk in chunks:
            if chunk.file in self._left:
                self._left[chunk.file] += 1
        self._open: dict[int, int] = {}
        self._sources: dict[int, int] = {}
        self._to_read: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._to_send: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._to_finish: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._unsent = sum(chunk.goes_on_from(place.index, place.size) for chunk in chunks)
        self._unfinished = len(self._left)

    def run(self) -> None:
        """Until every file is whole and everything is passed on. Raises what went wrong first."""
        _allow_many_files()
        threads: list[threading.Thread] = []
        try:
            self._begin()
            for work, *arguments in self._works():
                threads.append(start(self._guard, work, *arguments))
        except Exception as error:
            self._fail(error)
        for thread in threads:
            thread.join()
        self._close()
        if isinstance(self._error, DiskFull):
            self._copy.discard()
        if self._error is not None:
            raise self._error

    def stop(self, error: HpcserveError) -> None:
        """End `run` with `error`, unless it has one. From any thread."""
        with self._lock:
            if self._error is None:
                self._error = error
            if self._stopped:
                return
            self._stopped = True
        for link in (*self._before, *self._after):
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other side was quicker
        for waiting in (self._to_read, self._to_send):
            for _ in range(LANES):
                waiting.put(_END)
        self._to_finish.put(_END)

    # Before the threads.

    def _begin(self) -> None:
        files = self._copy.listing.files
        for index in sorted(self._left):
            self._open[index] = self._copy.create(index)
            os.truncate(self._open[index], files[index].size)
        for index in sorted(self._held & {chunk.file for chunk in self._chunks}):
            self._open[index] = self._copy.open_held(index)
        for index, left in self._left.items():
            if left == 0:  # an empty file
                self._to_finish.put(index)
        for number, chunk in enumerate(self._chunks):
            if chunk.owner == self._place.index:
                self._to_read.put(number)
        for _ in range(LANES):
            self._to_read.put(_END)
        if self._unsent == 0:
            self._end_sending()

    def _end_sending(self) -> None:
        for _ in range(LANES):
            self._to_send.put(_END)

    # The threads.

    def _works(self) -> Iterator[tuple[Any, ...]]:
        """What each does, and with what."""
        yield (self._finish,)
        for _ in range(LANES):
            yield (self._reader,)
        for link in self._before:
            yield self._receiver, link
        for link in self._after:
            yield self._sender, link

    def _guard(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, HpcserveError):
            self.stop(error)
        elif isinstance(error, OSError):
            self.stop(_local_trouble(error, self._copy, "write to"))
        else:
            self.stop(NotStaged(f"staging broke: {error!r}", hint="this is a bug in hpcserve"))

    def _reader(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        while not self._stopped:
            number = self._to_read.get()
            if number is _END:
                return
            chunk = self._chunks[number]
            file = self._copy.listing.files[chunk.file]
            piece = buffer[: chunk.length]
            if chunk.file in self._held:
                try:
                    _read_at(self._open[chunk.file], piece, chunk.offset)
                except OSError as error:
                    raise _local_trouble(error, self._copy, "read from") from error
            else:
                read_at(self._source(chunk.file), piece, chunk.offset, file)
            self._take(number, chunk, piece, xxhash.xxh3_128_digest(piece), mine=True)

    def _source(self, index: int) -> int:
        with self._lock:
            found = self._sources.get(index)
        if found is None:
            listing = self._copy.listing
            opened = open_source(listing.path, listing.files[index])
            with self._lock:
                found = self._sources.setdefault(index, opened)
            if found != opened:
                os.close(opened)
        return found

    def _receiver(self, link: socket.socket) -> None:
        buffer = memoryview(bytearray(CHUNK))
        head = memoryview(bytearray(_HEAD.size))
        place = self._place
        while True:
            self._receive(link, head)
            number, length, digest = _HEAD.unpack(head)
            if length == 0:
                return
            # What it says is looked at: it decides where bytes are written.
            chunk = self._chunks[number] if number < len(self._chunks) else None
            known = chunk is not None and chunk.comes_to(place.index, place.size)
            if chunk is None or not known or chunk.length != length or number in self._digests:
                raise NotStaged("the node before this one sent what was not asked of it")
            piece = buffer[:length]
            self._receive(link, piece)
            if xxhash.xxh3_128_digest(piece) != digest:
                file = self._copy.listing.files[chunk.file]
                raise NotStaged(
                    f"bytes of {file.name} changed on their way from the node before this one",
                    hint="bad memory, disk or network of one of the two nodes: tell your administrators",
                )
            self._take(number, chunk, piece, digest, mine=False)

    def _receive(self, link: socket.socket, buffer: memoryview) -> None:
        try:
            read_exactly(link, buffer)
        except OSError as error:
            raise LostNeighbour(f"lost the connection from the node before this one: {error}") from error

    def _take(self, number: int, chunk: Chunk, piece: memoryview, digest: bytes, *, mine: bool) -> None:
        """A chunk is in memory: write it down, and let it be passed on."""
        wanted = chunk.file not in self._held
        if wanted:
            _write_at(self._open[chunk.file], piece, chunk.offset)
        finished = False
        with self._lock:
            self._digests[number] = digest
            if wanted:
                self.present += chunk.length
                self._left[chunk.file] -= 1
                finished = self._left[chunk.file] == 0
            if not mine:
                self.received += chunk.length
            elif wanted:
                self.read += chunk.length
        if chunk.goes_on_from(self._place.index, self._place.size):
            self._to_send.put(number)
        if finished:
            self._to_finish.put(chunk.file)

    def _sender(self, link: socket.socket) -> None:
        try:
            self._send(link)
        except OSError as error:
            # sendfile(2) reads and sends: only the number tells which of the two failed.
            if isinstance(error, ConnectionError | TimeoutError) or error.errno in _NETWORK:
                raise LostNeighbour(f"lost the connection to the next node: {error}") from error
            raise _local_trouble(error, self._copy, "read from") from error

    def _send(self, link: socket.socket) -> None:
        while not self._stopped:
            number = self._to_send.get()
            if number is _END:
                break
            chunk = self._chunks[number]
            link.sendall(_HEAD.pack(number, chunk.length, self._digests[number]))
            _send_file(link, self._open[chunk.file], chunk)
            with self._lock:
                self._unsent -= 1
                last = self._unsent == 0
            if last:
                self._end_sending()
        if not self._stopped:
            link.sendall(_HEAD.pack(0, 0, bytes(16)))

    def _finish(self) -> None:
        """Files to the disk, one after the other, while the next ones come."""
        while self._unfinished and not self._stopped:
            index = self._to_finish.get()
            if index is _END:
                return
            self._copy.finish(index, self._open[index])
            self._unfinished -= 1

    def _close(self) -> None:
        for link in (*self._before, *self._after):
            link.close()
        for descriptor in (*self._open.values(), *self._sources.values()):
            os.close(descriptor)


def _read_at(descriptor: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        count = os.preadv(descriptor, [piece[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, _SHORTER)
        done += count


def _write_at(descriptor: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(descriptor, piece[done:], offset + done)


def _send_file(link: socket.socket, descriptor: int, chunk: Chunk) -> None:
    done = 0
    while done < chunk.length:
        count = os.sendfile(link.fileno(), descriptor, chunk.offset + done, chunk.length - done)
        if count == 0:
            raise OSError(errno.EIO, _SHORTER)
        done += count


def _local_trouble(error: OSError, copy: Copy, doing: str) -> NotStaged:
    told = f"can't {doing} {copy.directory}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free space there, or point `storage.node_local` of the site at another directory"
        return DiskFull(told, hint=hint)
    hint = "look at that directory on this node; `storage.node_local` of the site chooses another"
    return NotStaged(told, hint=hint)


def _allow_many_files() -> None:
    """A large model has more files than the usual limit of 1024 lets two descriptors each be open of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > _FILES:
        hard = max(_FILES, soft)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    elif soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
