"""Reading a server's answers strictly, with h11."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import h11


@dataclass(slots=True, kw_only=True)
class Reply:
    """A whole final answer."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    interim: int
    """How many 1xx answers came before it."""
    closes: bool


class Broken(Exception):
    """What came is no whole answer."""


class Replies:
    """Takes bytes in, gives whole answers out, to requests with the given methods, in order."""

    def __init__(self) -> None:
        self._data = b""
        self._parser: h11.Connection | None = None
        self._response: h11.Response | None = None
        self._interim = 0
        self._body: list[bytes] = []

    def feed(self, data: bytes, method: str = "GET") -> Reply | None:
        """The next answer, if it is whole. b"" says that the connection ended. Raises Broken."""
        if self._parser is None:
            self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
            self._parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            self._parser.send(h11.EndOfMessage())
            rest, self._data = self._data, b""
            if rest:
                self._parser.receive_data(rest)
        try:
            self._parser.receive_data(data)
            return self._next()
        except h11.RemoteProtocolError as error:
            raise Broken(str(error)) from error

    def more(self, method: str = "GET") -> Reply | None:
        """The next answer in what has come already."""
        if self._parser is None and not self._data:
            return None
        if self._parser is None:
            data, self._data = self._data, b""
            return self.feed(data, method)
        return self._next()

    @property
    def clean(self) -> bool:
        """Nothing is left over, and nothing is half read."""
        return not self._data and (self._parser is None or self._idle)

    @property
    def _idle(self) -> bool:
        assert self._parser is not None
        return self._response is None and not self._parser.trailing_data[0]

    def _next(self) -> Reply | None:
        parser = self._parser
        assert parser is not None
        while True:
            event = parser.next_event()
            if isinstance(event, h11.InformationalResponse):
                self._interim += 1
            elif isinstance(event, h11.Response):
                self._response = event
            elif isinstance(event, h11.Data):
                self._body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                response = self._response
                assert response is not None
                headers = {bytes(name): bytes(value) for name, value in response.headers}
                if len(headers) != len(list(response.headers)):
                    raise Broken(f"a header came twice: {list(response.headers)}")
                reply = Reply(
                    status=response.status_code,
                    headers=headers,
                    body=b"".join(self._body),
                    interim=self._interim,
                    closes=headers.get(b"connection") == b"close",
                )
                self._data = bytes(parser.trailing_data[0])
                self._parser = self._response = None
                self._interim = 0
                self._body = []
                return reply
            else:
                return None


async def read_reply(
    reader: asyncio.StreamReader, replies: Replies, method: str, deadline: float
) -> Reply | None:
    """The next whole answer; None when the connection ends before its first byte. Raises Broken."""
    reply = replies.more(method)
    async with asyncio.timeout(deadline):
        while reply is None:
            data = await reader.read(65536)
            if not data and replies.clean:
                return None
            reply = replies.feed(data, method)
            if reply is None and not data:
                raise Broken("the connection ended in the middle of an answer")
    return reply
