"""KV events over ZMQ as vLLM 0.32 publishes them.

PUB frames are `[topic, sequence number (8 bytes, big endian), msgpack [ts, events, dp rank]]`, and
events are maps with a `type`. The replay ROUTER answers an 8-byte start number with
`["", topic, sequence number, payload]` per kept batch and then `["", "", -1, ""]`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

from .kv_cache import Event

_KEPT_BATCHES = 10_000
_HIGH_WATER_MARK = 100_000
_TOPIC = b""
_END = (-1).to_bytes(8, "big", signed=True)


def of_rank(address: str, rank: int) -> str:
    """A data-parallel rank's address, made of the first one's as in vLLM (distributed/kv_events.py)."""
    if not rank:
        return address
    if "inproc" in address:
        return f"{address}_dp{rank}"
    base, _, port = address.rpartition(":")
    return f"{base}:{int(port) + rank}"


class KVEventPublisher:
    """Binds at once; `start()` begins to answer replay requests. Raises OSError if an address is taken."""

    def __init__(self, endpoint: str, replay_endpoint: str | None, *, rank: int = 0) -> None:
        self.endpoint = of_rank(endpoint, rank)
        self.replay_endpoint = None if replay_endpoint is None else of_rank(replay_endpoint, rank)
        self._rank = rank
        self._context = zmq.asyncio.Context()
        plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
        self._publisher: zmq.Socket[bytes] = plain.socket(zmq.PUB)
        self._publisher.set_hwm(_HIGH_WATER_MARK)
        self._replay: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        try:
            self._publisher.bind(self.endpoint)
            if self.replay_endpoint is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.bind(self.replay_endpoint)
        except zmq.ZMQError as error:
            # An open socket would keep the process from exiting.
            self.close()
            raise OSError(error.errno, error.strerror) from error
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_BATCHES)
        self._next = 0
        self._pack = msgspec.msgpack.Encoder()

    def start(self) -> None:
        if self._replay is not None:
            self._task = asyncio.get_running_loop().create_task(self._answer_replays(self._replay))

    def publish(self, events: Sequence[Event]) -> None:
        """One batch; its number is one more than the last batch's."""
        payload = self._pack.encode([time.time(), list(events), self._rank])
        number = self._next
        self._next += 1
        self._publisher.send_multipart((_TOPIC, number.to_bytes(8, "big"), payload))
        self._kept.append((number, payload))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._publisher.close(linger=0)
        if self._replay is not None:
            self._replay.close(linger=0)
        self._context.destroy(linger=0)

    def describe(self) -> dict[str, object]:
        """This publisher in the answer of /kv_event_sources."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "buffer_steps": _KEPT_BATCHES,
            "hwm": _HIGH_WATER_MARK,
            "max_queue_size": _HIGH_WATER_MARK,
            "topic": _TOPIC.decode(),
        }

    async def _answer_replays(self, replay: zmq.asyncio.Socket) -> None:
        while True:
            frames = await replay.recv_multipart()
            if len(frames) != 3:
                continue  # vLLM logs and ignores requests of another shape
            client, _, start = frames
            first = int.from_bytes(start, "big")
            for number, payload in list(self._kept):
                if number >= first:
                    await replay.send_multipart((client, b"", _TOPIC, number.to_bytes(8, "big"), payload))
            await replay.send_multipart((client, b"", b"", _END, b""))
