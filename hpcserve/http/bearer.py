"""The header that carries a key (RFC 6750 §2.1)."""

from __future__ import annotations

from .errors import Header


def bearer(key: str | None) -> list[Header]:
    """As headers: one, or none without a key."""
    return [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
