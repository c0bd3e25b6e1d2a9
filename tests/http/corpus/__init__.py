"""Requests that a proxy must refuse, or must hand on as exactly one request each.

From RFC 9110 and RFC 9112, and from the public record of how proxies and servers were made to disagree.
Each case is the bytes of one connection. `tests/http/test_strictness.py` sends them to a bare server,
`tests/router/strict` to a router in front of an engine that records what it gets; the fuzzer mutates them.
"""

from __future__ import annotations

from .bodies import BODIES
from .case import Case
from .framing import FRAMING
from .heads import HEADS
from .targets import TARGETS

__all__ = ["ALL", "BODIES", "FRAMING", "HEADS", "TARGETS", "Case"]

ALL: dict[str, Case] = {**FRAMING, **HEADS, **TARGETS, **BODIES}
assert len(ALL) == len(FRAMING) + len(HEADS) + len(TARGETS) + len(BODIES), "two cases have one name"
