"""Lines of a text file, which may be compressed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from ...errors import ConfigError
from .extras import need

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_LINE = 64 << 20
"""Bytes. What is longer is no line, and must not fill the memory."""

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PIECE = 1 << 20
_ZSTD_PIECE = 8 << 10
"""Bytes of compressed data unpacked at once; at worst, 4 bytes of zstd stand for 128 KiB."""


class Damaged(Exception):
    """What is inside a compressed file is not what was compressed."""


def lines(path: str, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of `path` with their numbers from 1; `name` stands for it in errors.

    The file's byte order mark is cut off. Raises ConfigError.
    """
    number = 0
    try:
        with _opened(path, name) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ConfigError(
                        f"{name}:{number}: the line is longer than {MAX_LINE >> 20} MiB",
                        hint="Write one row a line, and large files (images) as links instead.",
                    )
                if number == 1:
                    line = _without_mark(line, name)
                yield number, line
    except EOFError:
        raise ConfigError(
            f"{name}: cut off after line {number}: the compressed data has no end",
            hint="Copy or make the file again.",
        ) from None
    except (gzip.BadGzipFile, zlib.error, Damaged) as error:
        raise ConfigError(
            f"{name}: damaged after line {number}: {error}",
            hint="Copy or make the file again; is it what its suffix says?",
        ) from None
    except OSError as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{name}: can't be read: {error.strerror or error}",
        hint="Check the path, its owner and its permissions.",
    )


def text(line: bytes, name: str, number: int) -> str:
    """The line decoded. Raises ConfigError."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}:{number}: invalid UTF-8 in byte {error.start + 1} of the line",
            hint="Convert the file, for example with `iconv -f ISO-8859-1 -t UTF-8`.",
        ) from None


def _without_mark(line: bytes, name: str) -> bytes:
    if line.startswith(_UTF16_MARKS):
        raise ConfigError(
            f"{name}: UTF-16, not UTF-8", hint="Convert the file with `iconv -f UTF-16 -t UTF-8`."
        )
    return line.removeprefix(_UTF8_MARK)


def _opened(path: str, name: str) -> BinaryIO:
    suffix = path.lower()
    if suffix.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path, name), _PIECE))
    return open(path, "rb", buffering=_PIECE)


class _ZstdFile(io.RawIOBase):
    """Reads zstd frames. The package's own reader takes a file that was cut off for a whole one."""

    def __init__(self, path: str, name: str) -> None:
        zstandard = need("zstandard", f"{name}: reading .zst")
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        """Of a frame."""
        self._packed = b""
        """Behind the end of the last frame."""
        self._unpacked = memoryview(b"")
        self._file = open(path, "rb")  # noqa: SIM115 # closed by close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._unpacked:
            piece = self._packed or self._file.read(_ZSTD_PIECE)
            self._packed = b""
            if not piece:
                if self._inside:
                    raise EOFError
                return 0
            self._unpack(piece)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._unpacked))
        target[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self, piece: bytes) -> None:
        try:
            self._unpacked = memoryview(self._frame.decompress(piece))
        except self._error as error:
            raise Damaged(error) from None
        self._inside = not self._frame.eof
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
