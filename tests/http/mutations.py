"""Deterministic changes to HTTP messages: the ones that parsers are known to disagree about, and noise."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_LINES = (
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\tchunked", b"transfer-encoding: CHUNKED", b"Transfer_Encoding: chunked",
    b" Transfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked",
    b"Content-Length: 0", b"Content-Length: 1", b"Content-Length: 3", b"Content-Length: 30",
    b"Content-Length: +3", b"Content-Length: 3,3", b"Content-Length:",
    b"Content-Length: 18446744073709551619",
    b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade", b"Connection: content-length",
    b"Upgrade: h2c", b"Upgrade: websocket", b"Expect: 100-continue", b"Expect: x", b"Host: y", b"Host:",
    b"TE: trailers", b"Trailer: X", b"Keep-Alive: timeout=1", b"Content-Encoding: gzip", b"Date: x",
    b"X-Request-Id: a b", b"Content-Type: multipart/form-data; boundary=b",
    b"Content-Type: text/event-stream",
)  # fmt: skip
_TOKENS = (
    b"\r\n", b"\n", b"\r", b"\0", b"\t", b" ", b"\x0b", b"\x0c", b"\x7f", b"\x80", b"\xff", b"\xc3\xa9",
    b"\r\n\r\n", b"\n\n", b"\r\r\n", b":", b";", b",", b'"', b"\\", b"/", b"//", b"/../", b"%2e", b"%", b"?",
    b"#", b"@", b"*", b"{", b"}", b"[", b"0\r\n\r\n", b"0\r\n", b"3\r\nabc\r\n", b"ffffffff\r\n", b"0x3",
    b"-1",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http://x", b"chunked",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"data: {}\n\n",
    b"\xef\xbb\xbf", b"\\ud800", b"NaN", b"1e999", b"null", b"\xe2\x80\xa8",
)  # fmt: skip
_NUMBER = re.compile(rb"[0-9]+")
_LONGEST = 30_000


class Mutator:
    """A stream of mutated messages; equal seeds give equal messages."""

    def __init__(self, seeds: Sequence[bytes], seed: object) -> None:
        self._seeds = seeds
        self.random = random.Random(str(seed))
        self._steps: tuple[Callable[[bytes], bytes], ...] = (
            self._flip, self._flip, self._insert, self._insert, self._insert, self._delete, self._repeat,
            self._add_line, self._add_line, self._add_line, self._drop_line, self._swap_lines,
            self._repeat_line, self._number, self._number, self._splice, self._truncate, self._case,
            self._ends,
        )  # fmt: skip

    def message(self, most: int = 4) -> bytes:
        """One message with none to `most` changes: the fewer, the likelier."""
        data = self.random.choice(self._seeds)
        changes = min(most, int(self.random.expovariate(0.7)))
        for _ in range(changes):
            data = self.random.choice(self._steps)(data)
        return data[:_LONGEST]

    def pieces(self, data: bytes) -> list[bytes]:
        """The message as it is handed to the network: whole, in a few pieces, or byte by byte."""
        kind = self.random.random()
        if kind < 0.6 or len(data) < 2:
            return [data]
        if kind < 0.95:
            cuts = sorted(self.random.randrange(1, len(data)) for _ in range(self.random.randint(1, 4)))
        else:
            cuts = list(range(1, min(len(data), 300)))
        return [
            data[low:high] for low, high in zip([0, *cuts], [*cuts, len(data)], strict=True) if low < high
        ]

    def _at(self, data: bytes) -> int:
        """A place, often near a line's end, where the structure is."""
        if data and self.random.random() < 0.4:
            place = data.find(b"\r\n", self.random.randrange(len(data)))
            if place >= 0:
                return place + self.random.choice((0, 1, 2))
        # Bodies can be long; the head is where most is decided.
        reach = len(data) if self.random.random() < 0.5 else min(len(data), 200)
        return self.random.randint(0, reach)

    def _flip(self, data: bytes) -> bytes:
        at = self._at(data)
        if at >= len(data):
            return data
        byte = (
            data[at] ^ (1 << self.random.randrange(8))
            if self.random.random() < 0.5
            else self.random.randrange(256)
        )
        return data[:at] + bytes([byte]) + data[at + 1 :]

    def _insert(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + self.random.choice(_TOKENS) + data[at:]

    def _delete(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + data[at + self.random.choice((1, 1, 2, 4, 20)) :]

    def _repeat(self, data: bytes) -> bytes:
        at = self._at(data)
        part = data[at : at + self.random.choice((1, 2, 10, 100))]
        return data[:at] + part * self.random.choice((2, 3, 50)) + data[at + len(part) :]

    def _lines(self, data: bytes) -> tuple[list[bytes], bytes]:
        head, mark, rest = data.partition(b"\r\n\r\n")
        return head.split(b"\r\n"), mark + rest

    def _add_line(self, data: bytes) -> bytes:
        lines, rest = self._lines(data)
        lines.insert(self.random.randint(1, len(lines)), self.random.choice(_LINES))
        return b"\r\n".join(lines) + rest

    def _drop_line(self, data: bytes) -> bytes:
        lines, rest = self._lines(data)
        del lines[self.random.randrange(len(lines))]
        return b"\r\n".join(lines) + rest

    def _swap_lines(self, data: bytes) -> bytes:
        lines, rest = self._lines(data)
        self.random.shuffle(lines)
        return b"\r\n".join(lines) + rest

    def _repeat_line(self, data: bytes) -> bytes:
        lines, rest = self._lines(data)
        line = self.random.choice(lines)
        return b"\r\n".join([*lines, *[line] * self.random.choice((1, 1, 40))]) + rest

    def _number(self, data: bytes) -> bytes:
        found = list(_NUMBER.finditer(data[:5000]))
        if not found:
            return data
        match = self.random.choice(found)
        value = int(match[0][:18])
        new = self.random.choice(
            (value + 1, max(0, value - 1), 0, value * 10, 2**31, 2**32 + value, 2**64 + value)
        )
        return data[: match.start()] + b"%d" % new + data[match.end() :]

    def _splice(self, data: bytes) -> bytes:
        other = self.random.choice(self._seeds)
        if self.random.random() < 0.5:
            return data + other
        return data[: self._at(data)] + other[self._at(other) :]

    def _truncate(self, data: bytes) -> bytes:
        return data[: self._at(data)]

    def _case(self, data: bytes) -> bytes:
        at = self._at(data)
        return data[:at] + data[at : at + 20].swapcase() + data[at + 20 :]

    def _ends(self, data: bytes) -> bytes:
        """Other line ends."""
        at = self._at(data)
        return data[:at] + data[at:].replace(
            b"\r\n", self.random.choice((b"\n", b"\r", b"\r\r\n", b"\n\r")), 1
        )
