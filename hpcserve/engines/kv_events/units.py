"""Token units: the one measure of cached prefixes, whatever block size an engine has.

A prompt's tokens are cut into units of 128; a unit's hash covers all tokens up to its end. Hash of unit
k: XXH3-64 of its token ids as little-endian uint32, seeded with the hash of unit k-1, and the first with
`space()`. The same in agents and routers of one version; nothing else reads them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from xxhash import xxh3_64_intdigest

UNIT = 128
"""Tokens."""
UNIT_BYTES = UNIT * 4


def space(lora: str | None = None, salt: str | None = None) -> int:
    """The seed that keeps prefixes of different LoRAs and cache salts apart."""
    return xxh3_64_intdigest(f"{lora or ''}\0{salt or ''}".encode("utf-8", "surrogatepass"))


def token_bytes(tokens: Iterable[int]) -> bytes:
    """Raises OverflowError for an id outside of uint32, TypeError for what is no number."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def units_of(data: bytes, seed: int) -> list[int]:
    """Hashes of the whole units in `data`, which are `token_bytes`; a last part unit has none."""
    view = memoryview(data)
    hashes = []
    for start in range(0, len(data) - UNIT_BYTES + 1, UNIT_BYTES):
        seed = xxh3_64_intdigest(view[start : start + UNIT_BYTES], seed)
        hashes.append(seed)
    return hashes
