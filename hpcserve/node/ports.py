"""Free ports in the site's range, held by a bound socket until the engine takes them.

Jobs that share a node start looking at different places (derived from the job id), and a port the
kernel may hand out as a client port is only taken when the range leaves no other.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..errors import JobError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRange:
    """Where to look. `seed` spreads jobs; `ephemeral` is the kernel's client port range."""

    low: int
    high: int
    seed: str
    ephemeral: tuple[int, int] | None = None

    def candidates(self, count: int = 1) -> Iterator[int]:
        """First ports of blocks of `count`, each once, the best first."""
        starts = [range(self.low, self.high - count + 2, count)]
        if self.ephemeral is not None:
            first, last = self.ephemeral
            below = range(self.low, min(self.high, first - 1) - count + 2, count)
            above = range(max(self.low, last + 1), self.high - count + 2, count)
            inside = range(max(self.low, first), min(self.high, last) - count + 2, count)
            starts = [below, above, inside]
        digest = hashlib.sha256(self.seed.encode()).digest()
        for block in starts:
            if block:
                offset = int.from_bytes(digest[:8]) % len(block)
                yield from block[offset:]
                yield from block[:offset]


def ephemeral_range(path: Path = _EPHEMERAL) -> tuple[int, int] | None:
    """The kernel's client ports; None where /proc does not say."""
    try:
        low, high = path.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return None


class HeldPorts:
    """A block of bound ports. `release()` frees them just before their user binds them."""

    def __init__(self, first: int, sockets: list[socket.socket]) -> None:
        self.first = first
        self._sockets = sockets

    def release(self) -> None:
        for held in self._sockets:
            held.close()
        self._sockets = []

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(ports: PortRange, address: str, count: int = 1) -> HeldPorts:
    """Bind a block of `count` ports in a row on `address`. Raises JobError when none is free."""
    for first in ports.candidates(count):
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(_bind(address, port))
        except OSError:
            for taken in sockets:
                taken.close()
            continue
        return HeldPorts(first, sockets)
    raise JobError(
        f"no {count} free port{'s' if count > 1 else ''} in a row on {address}"
        f" between {ports.low} and {ports.high}",
        hint="widen `ports.low` and `ports.high` in the site config",
    )


def listen(ports: PortRange, address: str, backlog: int = 1024) -> socket.socket:
    """A listening socket on the first free port of the range. Raises JobError when none is free."""
    for port in ports.candidates():
        try:
            listening = _bind(address, port)
        except OSError:
            continue
        try:
            listening.listen(backlog)
        except OSError:
            # Taken between bind and listen by somebody with SO_REUSEADDR.
            listening.close()
            continue
        return listening
    raise JobError(
        f"no free port on {address} between {ports.low} and {ports.high}",
        hint="widen `ports.low` and `ports.high` in the site config",
    )


def _bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # No SO_REUSEADDR: with it, two agents on one machine could hold the same port.
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
