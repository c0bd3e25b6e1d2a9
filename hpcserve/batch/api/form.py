"""A form with a file in it (RFC 7578), read as it comes: the file may be larger than the memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import NamedTuple

from ...http.errors import HttpError

_BOUNDARY = re.compile(rb'(?i)multipart/form-data\s*;.*?\bboundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))')
_NAME = re.compile(rb'(?i);\s*name="((?:[^"\\\r\n]|\\.)*)"')
_FILENAME = re.compile(rb'(?i);\s*filename="((?:[^"\\\r\n]|\\.)*)"')
_DISPOSITION = re.compile(rb"(?im)^content-disposition[ \t]*:([^\r\n]*)")
_HEAD_MAX = 16 * 1024
_FIELD_MAX = 16 * 1024
_FIELDS_MAX = 32


class Part(NamedTuple):
    """The head of a part."""

    name: str
    filename: str | None
    """None: a plain field."""


class Form:
    """Use as `async for part in form.parts()`, reading `form.text()` or `form.data()` of each in between."""

    def __init__(self, content_type: bytes, pieces: AsyncIterator[bytes]) -> None:
        """Raises HttpError 400."""
        found = _BOUNDARY.match(content_type)
        if found is None:
            raise HttpError(400, "the content-type must be multipart/form-data with a boundary")
        self._mark = b"\r\n--" + (found[1] or found[2])
        self._pieces = pieces
        # The first mark has no line break before it.
        self._buffer = bytearray(b"\r\n")
        self._in_part = False

    async def parts(self) -> AsyncIterator[Part]:
        """Raises HttpError 400 for what is no form; what `pieces` raises comes through."""
        await self._skip_to_mark()
        for _ in range(_FIELDS_MAX):
            while len(self._buffer) < 2:
                await self._more()
            if self._buffer.startswith(b"--"):
                await self._drain()
                return
            head = await self._head()
            self._in_part = True
            yield _part(head)
            async for _ in self.data():
                pass  # what nobody has read
        raise HttpError(400, f"the form has more than {_FIELDS_MAX} parts")

    async def data(self) -> AsyncIterator[bytes]:
        """The content of the present part, in pieces."""
        while self._in_part:
            end = self._buffer.find(self._mark)
            if end >= 0:
                piece = bytes(self._buffer[:end])
                del self._buffer[: end + len(self._mark)]
                self._in_part = False
            else:
                # What may be the beginning of a mark stays.
                size = max(0, len(self._buffer) - len(self._mark))
                piece = bytes(self._buffer[:size])
                del self._buffer[:size]
            if piece:
                yield piece
            if self._in_part:
                await self._more()

    async def text(self) -> str:
        """The content of the present part, a short text. Raises HttpError 400."""
        found = bytearray()
        async for piece in self.data():
            found += piece
            if len(found) > _FIELD_MAX:
                raise HttpError(400, f"a field of the form is longer than {_FIELD_MAX} bytes")
        try:
            return found.decode()
        except UnicodeDecodeError:
            raise HttpError(400, "a field of the form is not valid UTF-8") from None

    async def _head(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _HEAD_MAX:
                raise HttpError(400, "the head of a part of the form is too long")
            await self._more()
        head = bytes(self._buffer[: end + 2])
        del self._buffer[: end + 4]
        return head

    async def _skip_to_mark(self) -> None:
        while (at := self._buffer.find(self._mark)) < 0:
            if len(self._buffer) > _HEAD_MAX:
                raise HttpError(400, "the multipart body does not begin with its boundary")
            await self._more()
        del self._buffer[: at + len(self._mark)]

    async def _more(self) -> None:
        try:
            self._buffer += await anext(self._pieces)
        except StopAsyncIteration:
            raise HttpError(400, "the multipart body is cut off") from None

    async def _drain(self) -> None:
        async for _ in self._pieces:
            pass


def _part(head: bytes) -> Part:
    found = _DISPOSITION.search(head)
    name = None if found is None else _NAME.search(found[1])
    if found is None or name is None:
        raise HttpError(
            400, 'each part of a form needs one header `Content-Disposition: form-data; name="…"`'
        )
    filename = _FILENAME.search(found[1])
    return Part(_unquoted(name[1]), None if filename is None else _unquoted(filename[1]))


def _unquoted(text: bytes) -> str:
    return re.sub(rb"\\(.)", rb"\1", text).decode("utf-8", "replace")
