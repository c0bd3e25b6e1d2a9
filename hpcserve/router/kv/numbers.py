"""Small numbers for names, so that sets of workers are bits of an integer."""

from __future__ import annotations

from collections.abc import Collection

_MASKS_KEPT = 1024


class Numbers:
    """Gives out the lowest free number below `most`. `blocked` ones, looked at each time, are not free."""

    def __init__(self, most: int, blocked: Collection[int]) -> None:
        self._most = most
        self._blocked = blocked
        self._name_of: dict[int, str] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        """Masks asked for lately: the same few come again and again."""

    @property
    def full(self) -> bool:
        return len(self._name_of) + len(self._blocked) >= self._most

    def take(self, name: str) -> int:
        """Raises LookupError when all are taken. A name can have several."""
        for number in range(self._most):
            if number not in self._name_of and number not in self._blocked:
                self._name_of[number] = name
                self._names.clear()
                return number
        raise LookupError(f"all {self._most} numbers are taken")

    def release(self, number: int) -> None:
        del self._name_of[number]
        self._names.clear()

    def names(self, mask: int) -> tuple[str, ...]:
        """The names of the numbers whose bits are set."""
        names = self._names.get(mask)
        if names is None:
            if len(self._names) >= _MASKS_KEPT:
                self._names.clear()
            found, rest = [], mask
            while rest:
                low = rest & -rest
                found.append(self._name_of[low.bit_length() - 1])
                rest ^= low
            names = self._names[mask] = tuple(found)
        return names
