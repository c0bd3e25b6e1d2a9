"""Messages between in-job programs over TCP: a 4-byte big-endian length and a JSON object.

Who may speak is shown by a MAC with the job's key over both sides' nonces.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import msgspec

MAX_FRAME = 1 << 20


def mac(key: bytes, direction: str, nonces: str, value: Any) -> str:
    """Hex digest that only a holder of `key` can make; `direction` keeps the two sides' apart."""
    text = msgspec.json.encode([direction, nonces, value], order="sorted")
    return hmac.new(key, text, "sha256").hexdigest()


def pack(message: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(message)
    return len(data).to_bytes(4, "big") + data


def unpack(data: bytes) -> dict[str, Any]:
    """Raises ValueError (msgspec's is one) for anything else than a JSON object."""
    message = msgspec.json.decode(data)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def length(head: bytes, most: int = MAX_FRAME) -> int:
    """Bytes that follow. Raises ValueError when they are too many."""
    count = int.from_bytes(head, "big")
    if count > most:
        raise ValueError(f"a frame of {count} bytes")
    return count


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(pack(message))


async def receive(reader: asyncio.StreamReader, most: int = MAX_FRAME) -> dict[str, Any]:
    """Raises IncompleteReadError at the end of the stream, ValueError for what is no message."""
    return unpack(await reader.readexactly(length(await reader.readexactly(4), most)))
