"""Test buffers in host or GPU memory, filled so that the bytes tell whose they are."""

from __future__ import annotations

from typing import Any, Literal
from zlib import crc32

SIZE = 64 << 20
"""Bytes. One transfer of it takes about a millisecond on the fastest links."""
_WORD = 8
_STEP = 0x9E3779B97F4A7C15
"""Odd, so that all words of a pattern differ: 2^64 over the golden ratio."""


def seed(name: str) -> int:
    """Of the pattern in the buffer of a probe."""
    return crc32(name.encode())


class Buffers:
    """A source with a pattern, and a sink for what comes.

    With torch, which every engine has; `where` is one of its devices, such as `cpu` or `cuda:0`.
    """

    def __init__(self, pattern: int, where: str, size: int = SIZE) -> None:
        import torch

        self._torch: Any = torch
        self._where: Any = torch.device(where)
        if self._where.type == "cuda":
            # As an engine's worker does: NIXL and UCX take the context that is current.
            torch.cuda.set_device(self._where)
        self.kind: Literal["DRAM", "VRAM"] = "VRAM" if self._where.type == "cuda" else "DRAM"
        self.device: int = self._where.index or 0
        self.size = size
        """Bytes of each."""
        self._source = self._words(pattern, size)
        self._sink = torch.zeros(size // _WORD, dtype=torch.int64, device=self._where)
        self._settle()
        self.source = int(self._source.data_ptr())
        self.sink = int(self._sink.data_ptr())

    def _words(self, pattern: int, size: int) -> Any:
        # torch has no arithmetic on uint64; int64 wraps to the same bits.
        step = _STEP - (1 << 64)
        count = size // _WORD
        words = self._torch.arange(count, dtype=self._torch.int64, device=self._where)
        return words.mul_(step).add_(pattern)

    def came(self, pattern: int, size: int) -> bool:
        """Are the sink's first `size` bytes those of that pattern? The sink is empty again after this."""
        same = bool(self._torch.equal(self._sink[: size // _WORD], self._words(pattern, size)))
        self._sink.zero_()
        self._settle()
        return same

    def _settle(self) -> None:
        """Wait for the GPU: NIXL does not know torch's streams."""
        if self._where.type == "cuda":
            self._torch.cuda.synchronize(self._where)
