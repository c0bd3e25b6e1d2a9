"""Test buffers in host or GPU memory, filled so that the bytes tell whose they are."""

from __future__ import annotations

from typing import Any, Literal, Protocol
from zlib import crc32

SIZE = 64 << 20
"""Bytes. One transfer of it takes about a millisecond on the fastest links."""
_WORD = 8
_STEP = 0x9E3779B97F4A7C15
"""Odd, so that all words of a pattern differ: 2^64 over the golden ratio."""


def seed(name: str) -> int:
    """Of the pattern in the buffer of a probe."""
    return crc32(name.encode())


class Buffers(Protocol):
    """A source with a pattern, and a sink for what comes."""

    kind: Literal["DRAM", "VRAM"]
    device: int
    size: int
    source: int
    sink: int

    def came(self, pattern: int, size: int) -> bool:
        """Are the sink's first `size` bytes those of that pattern? The sink is empty again after this."""


class HostBuffers:
    """With numpy, which NIXL brings; torch would take a second more to import."""

    kind: Literal["DRAM", "VRAM"] = "DRAM"
    device = 0

    def __init__(self, pattern: int, size: int = SIZE) -> None:
        import numpy

        self._numpy: Any = numpy
        self._source = self._words(pattern, size)
        self._sink = numpy.zeros(size // _WORD, dtype=numpy.uint64)
        self.size = size
        self.source = int(self._source.ctypes.data)
        self.sink = int(self._sink.ctypes.data)

    def _words(self, pattern: int, size: int) -> Any:
        return self._numpy.arange(size // _WORD, dtype=self._numpy.uint64) * self._numpy.uint64(
            _STEP
        ) + self._numpy.uint64(pattern)

    def came(self, pattern: int, size: int) -> bool:
        part = self._sink[: size // _WORD]
        same = bool(self._numpy.array_equal(part, self._words(pattern, size)))
        self._sink[:] = 0
        return same


class TensorBuffers:
    """With torch, which every engine with GPUs has. `where` is a torch device."""

    def __init__(self, pattern: int, where: str = "cuda:0", size: int = SIZE) -> None:
        import torch

        self._torch: Any = torch
        self._where: Any = torch.device(where)
        self.kind: Literal["DRAM", "VRAM"] = "VRAM" if self._where.type == "cuda" else "DRAM"
        self.device = self._where.index or 0
        self.size = size
        self._source = self._words(pattern, size)
        self._sink = torch.zeros(size // _WORD, dtype=torch.int64, device=self._where)
        self._settle()
        self.source = int(self._source.data_ptr())
        self.sink = int(self._sink.data_ptr())

    def _words(self, pattern: int, size: int) -> Any:
        torch = self._torch
        # torch has no arithmetic on uint64; int64 wraps to the same bits.
        step = _STEP - (1 << 64)
        return torch.arange(size // _WORD, dtype=torch.int64, device=self._where) * step + pattern

    def came(self, pattern: int, size: int) -> bool:
        part = self._sink[: size // _WORD]
        same = bool(self._torch.equal(part, self._words(pattern, size)))
        self._sink.zero_()
        self._settle()
        return same

    def _settle(self) -> None:
        """Wait for the GPU: NIXL does not know torch's streams."""
        if self._where.type == "cuda":
            self._torch.cuda.synchronize(self._where)
