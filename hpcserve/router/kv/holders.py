"""Which workers hold which token unit, and in which memory.

Most units lie on one worker: those are a 16-bit number in a Table. Units on several workers, such as a
system prompt's, have a mask in a dict.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ...engines.kv_events.format import TIERS
from .table import BUCKETS, Table

IDS = 4096
"""Numbers that workers can have; an answer of `get()` has as many bits for each tier, GPU lowest."""
ALL = (1 << IDS) - 1
_TIERS = range(len(TIERS))
_MANY = 0xFFFF
_SWEPT = 8
"""Buckets looked at in each call of `sweep()`: below a millisecond at ten million units."""


class Holders:
    """Numbers of workers are 0 to IDS-1; a number that was forgotten is free after a while."""

    def __init__(self, *, most: int) -> None:
        self._table = Table("H", most=most, on_evicted=self._evicted)
        self._many: dict[int, int] = {}
        self._dead: dict[int, int] = {}
        """Forgotten number -> buckets that may still name it."""
        self._dead_bits = 0
        self._next = 0
        self.tiered = False
        """Was there ever a unit outside of GPU memory?"""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def evicted(self) -> int:
        return self._table.evicted

    @property
    def forgotten(self) -> Collection[int]:
        """Numbers that can't be given out again yet."""
        return self._dead.keys()

    def get(self, unit: int) -> int:
        """Bit `tier * IDS + number` for each holder."""
        value = self._table.get(unit)
        if value is None:
            return 0
        bits = self._many.get(unit, 0) if value == _MANY else 1 << value
        return bits & ~self._dead_bits if self._dead_bits else bits

    def put(self, units: Iterable[int], number: int, tier: int) -> None:
        """`number` holds these now in `tier`, and in no other."""
        if tier:
            self.tiered = True
        own = tier * IDS + number
        ours = _all_tiers(number)
        table = self._table
        for unit in units:
            value = table.get(unit)
            if value is None or value == own:
                table.put(unit, own)
                continue
            bits = self._many.get(unit, 0) if value == _MANY else 1 << value
            self._set(unit, bits & ~ours & ~self._dead_bits | 1 << own)

    def drop(self, units: Iterable[int], number: int) -> None:
        """`number` holds these no more."""
        gone = _all_tiers(number)
        for unit in units:
            value = self._table.get(unit)
            if value is not None:
                bits = self._many.get(unit, 0) if value == _MANY else 1 << value
                self._set(unit, bits & ~gone)

    def forget(self, number: int) -> None:
        """`number` holds nothing any more. It must not be used again while it is in `forgotten`."""
        self._dead[number] = BUCKETS
        self._dead_bits |= _all_tiers(number)

    def sweep(self) -> None:
        """A little of the work that forgetting leaves; call it now and then."""
        if not self._dead:
            return
        for _ in range(_SWEPT):
            for unit, value in self._table.entries(self._next):
                bits = self._many.get(unit, 0) if value == _MANY else 1 << value
                if bits & self._dead_bits:
                    self._set(unit, bits & ~self._dead_bits)
            self._next = (self._next + 1) % BUCKETS
        for number, left in list(self._dead.items()):
            if left > _SWEPT:
                self._dead[number] = left - _SWEPT
            else:
                del self._dead[number]
                self._dead_bits &= ~_all_tiers(number)

    def _set(self, unit: int, bits: int) -> None:
        if bits & (bits - 1):
            self._many[unit] = bits
            self._table.put(unit, _MANY)
            return
        self._many.pop(unit, None)
        if bits:
            self._table.put(unit, bits.bit_length() - 1)
        else:
            self._table.remove(unit)

    def _evicted(self, unit: int) -> None:
        self._many.pop(unit, None)


def _all_tiers(number: int) -> int:
    bits = 0
    for tier in _TIERS:
        bits |= 1 << (tier * IDS + number)
    return bits
