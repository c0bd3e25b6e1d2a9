"""News about a worker's KV cache on its way to the routers; hashes travel as packed uint64.

In JSON, as on the router's control line, they are in base64. Both ends have the same byte order: that of
every machine GPUs are in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from .digest import Changes

_MOST_UNITS = 16_384
"""In one message: 170 KB of JSON."""

Op = tuple[Literal["clear", "drop", "store", "live", "silent"], int, bytes]
"""Name, tier (for `store`), units. `live` and `silent` say whether the engine's events are followed."""


class KvMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kv"):
    """From whoever reads the engine's events: the agent on its node, or the router itself."""

    worker: str
    generation: int = 0
    source: int = 0
    """A replica over several nodes has an agent, and so a source, on each."""
    seq: int
    """Counts up by one; 0 begins anew, with everything there is."""
    ops: tuple[Op, ...] = ()


def pack(hashes: Iterable[int]) -> bytes:
    return array("Q", hashes).tobytes()


def unpack(packed: bytes) -> array[int]:
    """Raises ValueError for what isn't a whole number of hashes."""
    hashes = array("Q")
    hashes.frombytes(packed)
    return hashes


class News:
    """Numbers the messages about one worker."""

    def __init__(self, worker: str, *, generation: int = 0, source: int = 0) -> None:
        self.worker = worker
        self._generation = generation
        self._source = source
        self._next = 0
        self._live: bool | None = None

    def of(self, changes: Changes, *, live: bool, anew: bool = False) -> list[KvMessage]:
        """The messages that tell this. `anew`: `changes` is a snapshot, and numbers start at 0 again."""
        if anew:
            self._next = 0
            self._live = None
        ops = list(_ops(changes))
        if live != self._live:
            self._live = live
            ops.append(("live" if live else "silent", 0, b""))
        return [self._message(part) for part in _parts(ops)]

    def _message(self, ops: list[Op]) -> KvMessage:
        number, self._next = self._next, self._next + 1
        return KvMessage(
            worker=self.worker, generation=self._generation, source=self._source, seq=number, ops=tuple(ops)
        )


def _ops(changes: Changes) -> Iterator[Op]:
    if changes.cleared:
        yield ("clear", 0, b"")
    for at in range(0, len(changes.dropped), _MOST_UNITS):
        yield ("drop", 0, pack(changes.dropped[at : at + _MOST_UNITS]))
    for tier, units in changes.stored.items():
        for at in range(0, len(units), _MOST_UNITS):
            yield ("store", tier, pack(units[at : at + _MOST_UNITS]))


def _parts(ops: list[Op]) -> Iterator[list[Op]]:
    part: list[Op] = []
    size = 0
    for op in ops:
        if part and size + len(op[2]) > _MOST_UNITS * 8:
            yield part
            part, size = [], 0
        part.append(op)
        size += len(op[2])
    if part:
        yield part
