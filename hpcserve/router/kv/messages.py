"""What router processes tell each other about KV caches, by way of their supervisor."""

from __future__ import annotations

import msgspec


class SharedMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kv_shared"):
    """Where one process sent prompts, and what it learned about their tokens; hashes are packed uint64."""

    placed: tuple[tuple[str, float, bytes], ...] = ()
    """Worker, tokens of a chunk, chain."""
    learned: bytes = b""
    """Chunk, unit, chunk, unit, …"""
