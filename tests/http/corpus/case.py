"""What a case is, and short ways to write one."""

from __future__ import annotations

from dataclasses import dataclass

PATH = b"/tokenize"
"""A route that takes any JSON object by POST, and is handed on."""
READ = b"/version"
"""A route that is handed on for GET."""
NEXT = b"GET /version?next HTTP/1.1\r\nHost: x\r\n\r\n"
"""Sent behind each case: the request that would be smuggled, or the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """A request as an engine must see it."""

    method: str
    target: str
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Bytes, and what becomes of them."""

    data: bytes
    status: int
    """Of the first answer."""
    got: tuple[Got, ...] = ()
    """What reaches an engine; nothing when it is refused."""
    goes_on: bool = False
    """`NEXT`, sent behind it, is answered too. Otherwise the connection ends after the last answer."""

    routed: bool = True
    """Otherwise a router answers 404 itself, and goes on."""

    def pieces(self) -> list[bytes]:
        """The case in up to 400 pieces, and `NEXT` where the server still listens for it.

        What comes after a close that the client asked for resets the connection.
        """
        data = self.data if self.status == 200 and not self.goes_on else self.data + NEXT
        step = max(1, len(data) // 400)
        return [data[at : at + step] for at in range(0, len(data), step)]


def refused(data: bytes, status: int = 400) -> Case:
    """Not served, and nothing behind it on this connection."""
    return Case(data=data, status=status)


def served(data: bytes, *got: Got, goes_on: bool = True, routed: bool = True) -> Case:
    return Case(data=data, status=200, got=got, goes_on=goes_on, routed=routed)


def head(
    *lines: bytes, method: bytes = b"POST", target: bytes | None = None, version: bytes = b"1.1"
) -> bytes:
    """A request head with a Host and these lines; a body may follow."""
    if target is None:
        target = PATH if method == b"POST" else READ
    first = b"%b %b HTTP/%b" % (method, target, version)
    return b"\r\n".join([first, b"Host: x", *lines]) + b"\r\n\r\n"


def post(body: bytes = b"{ }", target: str = PATH.decode()) -> Got:
    return Got(method="POST", target=target, body=body)


def get(target: str = READ.decode()) -> Got:
    return Got(method="GET", target=target)
