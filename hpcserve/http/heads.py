"""Heads that were read before, and need no second reading: the compiled `head_cache.pyx` as others see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from .compiled import compiled
from .errors import Header

Kept = TypeVar("Kept")


class Headers(list[Header]):
    """An answer's headers, the same object each time this head comes again."""

    __slots__ = ("_length_at", "told")

    def __init__(self, headers: Sequence[Header]) -> None:
        super().__init__(headers)
        names = [name for name, _ in headers]
        self._length_at = names.index(b"content-length") if b"content-length" in names else -1
        self.told: Any = None
        """What a reader has made of them, for the next time."""

    def of_length(self, size: int) -> list[Header]:
        """Those of an answer with this head and a body of `size` bytes, for which a head is known."""
        at, digits = self._length_at, b"%d" % size
        if at < 0 or self[at][1] == digits:
            return self
        return [*self[:at], (b"content-length", digits), *self[at + 1 :]]


class Heads(Protocol):
    """What was made of heads, by their bytes."""

    def find(self, data: bytes) -> tuple[Any, int, int] | None:
        """What was kept for the head that `data` begins with, where that head ends, and its Content-Length
        or -1; None for a head that isn't known."""
        ...

    def again(self, data: bytes) -> bool:
        """Has this head come before? Only then is it worth keeping."""
        ...

    def keep(self, data: bytes, headers: Sequence[Header], known: Any) -> bool:
        """The strict parser has read `headers` in this head; the next time `find()` gives `known`."""
        ...

    def answer(self, data: bytes) -> tuple[Any, bytes, int, int, bytes | None] | None:
        """Of a known head, what was kept, and the body: in which bytes it is, from where to where. It must be
        there to its last byte, with Content-Length or in chunks of their usual form; or up to the end of a
        chunk, and then the last value is the head as it came. Else None."""
        ...

    def rest(self, data: bytes) -> tuple[bytes, int, int, bool] | None:
        """Of what comes behind a chunk, a piece of the body: in which bytes it is, from where to where, and
        whether it is the last. It must end with a chunk, all of their usual form. Else None."""
        ...


def heads() -> Heads | None:
    """A new one; None where it was not compiled: then each head is parsed."""
    module = compiled("http.head_cache", "each request's head")
    found: Heads | None = None if module is None else module.Heads()
    return found
