"""What one client may cost a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits for each connection. Times are seconds."""

    head: int = 64 * 1024
    """Bytes of request line and headers."""
    head_timeout: float = 15.0
    """From the first byte of a head to its last, however it trickles."""
    idle_timeout: float = 75.0
    """Between requests."""
    body_timeout: float = 60.0
    """Without progress in a body; `body_rate` is the least that counts as progress."""
    body_rate: float = 1024.0
    """Bytes per second."""
    write_timeout: float = 600.0
    """How long a client may refuse to read an answer."""
