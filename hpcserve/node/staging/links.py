"""The sockets of the ring: several from each node to the next, opened with the job's key."""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .. import frames
from .trouble import NotStaged

LANES = 4
"""Connections from a node to the next: one TCP stream does not fill a fast link."""
_HELLO = 5.0
"""Seconds a stranger may stay silent."""
LINK_WAIT = 60.0
"""Seconds for the neighbour to connect, or to take a connection."""
_LOOK = 0.5
"""Seconds between two looks at whether all is over."""
_MAX_HELLO = 4096
_Failed = (OSError, ValueError, KeyError, TypeError)
"""What a peer that is not ours, or that died, shows itself as."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is in the ring."""

    index: int
    size: int


def open_ring(
    listening: socket.socket,
    following: tuple[str, int],
    key: bytes,
    ring: str,
    place: Place,
    over: threading.Event,
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Lanes from the node before and to the one at `following`, opened at the same time on all nodes.

    Raises NotStaged when either does not come about, and soon when `over` is set.
    """
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(accept_lanes, listening, key, ring, (place.index - 1) % place.size, over)
        after: list[socket.socket] = []
        try:
            after = connect_lanes(*following, key, ring, place.index, over)
            return before.result(), after
        except NotStaged:
            for link in (*after, *(before.result() if before.exception() is None else ())):
                link.close()
            raise


def accept_lanes(
    listening: socket.socket, key: bytes, ring: str, before: int, over: threading.Event
) -> list[socket.socket]:
    """Connections from place `before`, whoever else knocks. `ring` names this ring, and no other.

    Raises NotStaged when they do not come.
    """
    deadline = time.monotonic() + LINK_WAIT
    lanes: dict[int, socket.socket] = {}
    while len(lanes) < LANES:
        listening.settimeout(_LOOK)
        try:
            link, _ = listening.accept()
        except OSError as error:
            if isinstance(error, TimeoutError) and time.monotonic() < deadline and not over.is_set():
                continue
            _close(lanes)
            raise NotStaged(
                f"the node before this one did not connect within {LINK_WAIT:g} s ({error})",
                hint="a firewall between the nodes looks like this; `network.control_interface` of the site"
                " names the network that is used",
            ) from error
        try:
            link.settimeout(_HELLO)
            lane = _check(link, key, ring, before)
        except _Failed:
            link.close()
            continue
        if lane in lanes:
            link.close()
            continue
        lanes[lane] = _tuned(link)
    return list(lanes.values())


def _check(link: socket.socket, key: bytes, ring: str, before: int) -> int:
    nonce = secrets.token_hex(16)
    link.sendall(frames.pack({"nonce": nonce}))
    hello = _receive(link)
    nonces = f"{nonce} {hello['nonce']}"
    said = [ring, hello["place"], hello["lane"]]
    if not hmac.compare_digest(hello["mac"], frames.mac(key, "lane", nonces, said)):
        raise ValueError("wrong key")
    if hello["place"] != before or hello["lane"] not in range(LANES):
        raise ValueError("not the neighbour")
    link.sendall(frames.pack({"mac": frames.mac(key, "taken", nonces, said)}))
    return int(hello["lane"])


def connect_lanes(
    address: str, port: int, key: bytes, ring: str, place: int, over: threading.Event
) -> list[socket.socket]:
    """Connections to the next node, as `place`. Raises NotStaged when it can't be reached."""
    deadline = time.monotonic() + LINK_WAIT
    lanes: dict[int, socket.socket] = {}
    while len(lanes) < LANES:
        try:
            lanes[len(lanes)] = _open(address, port, key, ring, place, len(lanes))
        except _Failed as error:
            if time.monotonic() > deadline or over.is_set():
                _close(lanes)
                raise NotStaged(
                    f"can't connect to the next node at {address}:{port} ({error})",
                    hint="a firewall between the nodes looks like this; `network.control_interface` of the"
                    " site names the network that is used",
                ) from error
            time.sleep(0.2)
    return list(lanes.values())


def _open(address: str, port: int, key: bytes, ring: str, place: int, lane: int) -> socket.socket:
    link = socket.create_connection((address, port), timeout=_HELLO)
    try:
        # The other side takes one after the other, and may first send strangers away.
        link.settimeout(2 * _HELLO)
        nonce = secrets.token_hex(16)
        nonces = f"{_receive(link)['nonce']} {nonce}"
        said = [ring, place, lane]
        mac = frames.mac(key, "lane", nonces, said)
        link.sendall(frames.pack({"nonce": nonce, "place": place, "lane": lane, "mac": mac}))
        if not hmac.compare_digest(_receive(link)["mac"], frames.mac(key, "taken", nonces, said)):
            raise ValueError("it does not know the job's key")
    except BaseException:
        link.close()
        raise
    return _tuned(link)


def _receive(link: socket.socket) -> dict[str, Any]:
    head = bytearray(4)
    read_exactly(link, memoryview(head))
    body = bytearray(frames.length(bytes(head), _MAX_HELLO))
    read_exactly(link, memoryview(body))
    return frames.unpack(bytes(body))


def read_exactly(link: socket.socket, buffer: memoryview) -> None:
    """Raises ConnectionError at the end of the stream."""
    done = 0
    while done < len(buffer):
        count = link.recv_into(buffer[done:])
        if count == 0:
            raise ConnectionError("the connection was closed")
        done += count


def _tuned(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _close(lanes: dict[int, socket.socket]) -> None:
    for link in lanes.values():
        link.close()
