"""Messages between programs of one job over TCP, proven with the job's key.

A frame is a 4-byte big-endian length and a JSON object. Whoever listens speaks first:

    server -> client   {"attempt", "nonce"}
    client -> server   {"nonce"}
    then, both ways    {"message", "mac"}     mac over sender, number, both nonces and the message

Nothing that a stranger says counts, and nothing said once can be said again.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from contextlib import suppress
from typing import Any

import msgspec

from ..errors import RendezvousError

MAX_FRAME = 1 << 20
HELLO_TIMEOUT = 10.0
"""Seconds a stranger may stay silent."""
CLOSE_TIMEOUT = 2.0
"""Seconds for what was sent last to go out."""
Failed = (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError, KeyError, TypeError)
"""What a peer that is not ours, or that died, shows itself as. msgspec's errors are ValueErrors."""


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


class WrongKey(RendezvousError):
    """The other side does not know the job's key, or is not who it says."""


class Channel:
    """A conversation of two sides that both know the key. Opened by `accept` or `connect`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        key: bytes,
        nonces: str,
        sides: tuple[str, str],
        most: int,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._key = key
        self._nonces = nonces
        self._own, self._other = sides
        self._most = most
        self._sent = 0
        self._received = 0

    @property
    def peer(self) -> str:
        """Address of the other side."""
        return str((self._writer.get_extra_info("peername") or ("?",))[0])

    def put(self, message: dict[str, Any]) -> None:
        """Send without waiting until the other side takes it. One that is gone is noticed by `receive`."""
        proof = mac(self._key, f"{self._own} {self._sent}", self._nonces, message)
        self._sent += 1
        send(self._writer, {"message": message, "mac": proof})

    async def send(self, message: dict[str, Any]) -> None:
        """Raises OSError when the other side is gone."""
        self.put(message)
        await self.drain()

    async def drain(self) -> None:
        """Wait until little of what was sent is still here. Raises OSError when the other side is gone."""
        await self._writer.drain()

    async def receive(self) -> dict[str, Any]:
        """Raises WrongKey, or one of `Failed` when the other side is gone or speaks something else."""
        frame = await receive(self._reader, self._most)
        message = frame["message"]
        proof = mac(self._key, f"{self._other} {self._received}", self._nonces, message)
        if not hmac.compare_digest(str(frame["mac"]), proof) or not isinstance(message, dict):
            raise WrongKey(f"{self.peer} does not know the job's key")
        self._received += 1
        return message

    async def close(self) -> None:
        """Waits no longer than a moment for a side that takes nothing more, as on a node without power."""
        self._writer.close()
        with suppress(OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        self._writer.transport.abort()


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    key: bytes,
    attempt: str,
    most: int = MAX_FRAME,
) -> Channel:
    """The listening side. The peer is a stranger until its first message is received.

    No message may have more than `most` bytes.
    """
    nonce = secrets.token_hex(16)
    send(writer, {"attempt": attempt, "nonce": nonce})
    async with asyncio.timeout(HELLO_TIMEOUT):
        theirs = str((await receive(reader))["nonce"])
    nonces, sides = f"{nonce} {theirs}", ("server", "client")
    return Channel(reader, writer, key=key, nonces=nonces, sides=sides, most=most)


async def connect(
    address: str, port: int, *, key: bytes, attempt: str, seconds: float, most: int = MAX_FRAME
) -> Channel | None:
    """The other side; None for a server of another job. Raises one of `Failed` when nobody answers."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(address, port, limit=MAX_FRAME + 4)
    try:
        async with asyncio.timeout(min(seconds, HELLO_TIMEOUT)):
            hello = await receive(reader)
        if hello["attempt"] != attempt:
            writer.close()
            await writer.wait_closed()
            return None
        nonce = secrets.token_hex(16)
        send(writer, {"nonce": nonce})
        nonces, sides = f"{hello['nonce']} {nonce}", ("client", "server")
        return Channel(reader, writer, key=key, nonces=nonces, sides=sides, most=most)
    except BaseException:
        writer.close()
        raise
