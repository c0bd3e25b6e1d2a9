"""How many bytes of request bodies a relay holds in memory."""

from __future__ import annotations

from types import TracebackType

from ...http.errors import HttpError
from ...http.exchange import Exchange


class Bodies:
    """Bytes that bodies may take, of one process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def hold(self, exchange: Exchange, largest: int) -> Held:
        """`with bodies.hold(exchange, largest):` around reading a body and keeping it.

        A body that does not say its length counts as the largest allowed. Raises HttpError 429 when there
        is no room; a body that is too large by itself is not refused here.
        """
        declared = exchange.header(b"content-length")
        if declared is not None:
            size = min(int(declared), largest)
        else:
            size = largest if exchange.header(b"transfer-encoding") is not None else 0
        if self.held + size > self._limit and self.held:
            raise HttpError(
                429,
                "the bodies of requests that are being read take all the memory there is for them",
                headers=((b"retry-after", b"1"), (b"x-hpcserve-reason", b"body_memory")),
                code="body_memory",
            )
        self.held += size
        return Held(self, size)

    def take(self, size: int) -> bool:
        """Room for a body that is here already; `give_back()` ends it. False: there is none."""
        if self.held + size > self._limit and self.held:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        self.held -= size


class Held:
    """Bytes that one body takes."""

    __slots__ = ("_bodies", "_size")

    def __init__(self, bodies: Bodies, size: int) -> None:
        self._bodies = bodies
        self._size = size

    def read(self, size: int) -> None:
        """The body is whole, and this large."""
        self._bodies.held += size - self._size
        self._size = size

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bodies.held -= self._size
        self._size = 0
