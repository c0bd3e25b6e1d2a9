"""Slurm's host lists: `n[1-3,07],login` is four names and a login node."""

from __future__ import annotations

import re
from itertools import product

_PART = re.compile(r"\[([^\]]*)\]")


def expand(text: str) -> tuple[str, ...]:
    """Names in the order Slurm gives them; zero padding is kept, several brackets multiply.

    Raises ValueError for text that is no host list.
    """
    return tuple(name for piece in _split(text.strip()) for name in _expand_piece(piece))


def _split(text: str) -> list[str]:
    """Cut at commas outside brackets."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"not a host list: {text!r}")
        if character == "," and depth == 0:
            pieces.append(current)
            current = ""
        else:
            current += character
    if depth:
        raise ValueError(f"not a host list: {text!r}")
    return [piece for piece in [*pieces, current] if piece]


def _expand_piece(piece: str) -> list[str]:
    # split() with one group alternates: literal, inside of brackets, literal, …
    parts = _PART.split(piece)
    choices = [_ranges(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _ranges(inside: str) -> list[str]:
    names: list[str] = []
    for item in inside.split(","):
        low, dash, high = item.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"not a range of a host list: {item!r}")
        last = int(high) if dash else int(low)
        names += [str(number).zfill(len(low)) for number in range(int(low), last + 1)]
    return names
