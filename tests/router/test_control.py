"""The line to the head node when the head node does not listen."""

from __future__ import annotations

import contextlib
import socket

import msgspec

from hpcserve.router.control import Control

from .stubs import until


async def test_messages_nobody_reads_do_not_pile_up() -> None:
    ours, heads = socket.socketpair()
    control = Control(lambda message: None, lambda: None, msgspec.json.Decoder(dict))
    await control.open(ours.detach())
    writer = control._writer
    assert writer is not None
    for number in range(20_000):
        control.send({"type": "stats", "requests": number, "filler": "x" * 1000})
    assert writer.transport.get_write_buffer_size() < 2 * 1024 * 1024
    heads.setblocking(False)
    received = bytearray()

    def read_on() -> bool:
        with contextlib.suppress(BlockingIOError):
            received.extend(heads.recv(1 << 20))
        return not writer.transport.get_write_buffer_size() and received.endswith(b"\n")

    await until(read_on, "what was queued")
    control.send({"type": "stats", "requests": -1})
    await until(lambda: read_on() and b'"requests":-1' in received, "the line to work again")
    assert all(msgspec.json.decode(line)["type"] == "stats" for line in received.splitlines())
    await control.close()
    heads.close()
