"""The decode side of a KV transfer: handshake, pull, checksum, notification, heartbeats."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Items
from contextlib import asynccontextmanager
from typing import Any

from .failures import Failures
from .flags import Flags
from .language import State, kv_chunk
from .metrics import Metrics
from .scheduler import LoadError
from .sequence import Sequence
from .side_channel import WireError, compatibility, frame_bytes, read_frame

log = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT = 5.0
_STALL_TIMEOUT = 30.0
_READ_SIZE = 1 << 18
_TOKENS_PER_CHECK = 256
_REQUIRED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")

Failure = (WireError, OSError, TimeoutError)


class Peer:
    """An open connection to a prefill engine's side channel."""

    def __init__(
        self, engine_id: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._engine_id = engine_id
        self.reader = reader
        self._writer = writer

    async def call(
        self, op: str, *, patience: float | None = _HANDSHAKE_TIMEOUT, **fields: object
    ) -> dict[str, Any]:
        """The answer to one request. Raises WireError for a refusal."""
        self._writer.write(frame_bytes({"op": op, "engine_id": self._engine_id, **fields}))
        answer = await asyncio.wait_for(read_frame(self.reader), patience)
        if not answer.get("ok"):
            raise WireError(str(answer.get("error")))
        return answer


class Puller:
    """Pulls KV blocks from prefill engines, and keeps their leases alive until it has."""

    def __init__(self, flags: Flags, metrics: Metrics, failures: Failures) -> None:
        self._flags = flags
        self._metrics = metrics
        self._failures = failures
        self._tracked: dict[Sequence, Mapping[str, Any]] = {}
        self._heartbeat: asyncio.Task[None] | None = None
        self._notifications: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        for task in [self._heartbeat, *self._notifications]:
            if task is not None:
                task.cancel()

    def track(self, sequence: Sequence) -> None:
        """Send heartbeats for a sequence until `untrack`; as in vLLM only if its tp_size is known."""
        params = sequence.kv_params
        if params.get("tp_size") is None or any(params.get(key) is None for key in _REQUIRED):
            return
        self._tracked[sequence] = params
        if self._heartbeat is None:
            self._heartbeat = asyncio.get_running_loop().create_task(self._send_heartbeats())

    def untrack(self, sequence: Sequence) -> None:
        self._tracked.pop(sequence, None)

    async def load(self, sequence: Sequence, start: int, end: int) -> None:
        """Pull the KV of prompt tokens `start` to `end`, then let the prefill engine free its blocks.

        Raises LoadError when they did not arrive whole; the failure is logged and counted.
        """
        params = sequence.kv_params
        missing = [key for key in _REQUIRED if params.get(key) is None]
        try:
            if missing:
                log.warning("Got invalid KVTransferParams: %s", params)
                raise LoadError(f"kv_transfer_params without {', '.join(missing)}")
            if self._failures.drops_transfer():
                raise WireError("dropped on command")
            await self._pull(sequence, start, end)
        except Failure as error:
            self._metrics.failed_transfers.inc()
            log.error("KV transfer of request %s failed: %s", sequence.request_id, error)
            raise LoadError(str(error)) from error
        finally:
            self.untrack(sequence)

    def notify(self, sequence: Sequence) -> None:
        """Tell the prefill engine, in the background, that its blocks are not needed."""
        self.notify_params(sequence.kv_params)

    def notify_params(self, params: Mapping[str, Any]) -> None:
        if any(params.get(key) is None for key in _REQUIRED):
            return
        task = asyncio.get_running_loop().create_task(self._notify(params))
        self._notifications.add(task)
        task.add_done_callback(self._notifications.discard)

    async def _pull(self, sequence: Sequence, start: int, end: int) -> None:
        params = sequence.kv_params
        loop = asyncio.get_running_loop()
        request_id = params["remote_request_id"]
        began = loop.time()
        async with self._connect(params) as peer:
            if end > start:
                answer = await peer.call("pull", request_id=request_id, start=start, end=end)
                posted = loop.time() - began
                size = await self._receive(peer, sequence.tokens, start, end, int(answer["bytes"]))
                blocks = -(-end // self._flags.block_size) - start // self._flags.block_size
                self._metrics.transferred(
                    seconds=loop.time() - began, posted=posted, size=size, descriptors=blocks
                )
            try:
                await peer.call("done", request_id=request_id)
            except Failure as error:
                self._count_failed_notification(str(request_id), error)

    async def _receive(self, peer: Peer, ids: Items[int], start: int, end: int, announced: int) -> int:
        """Read and verify: the bytes must be the KV of this prompt's tokens. Returns how many came."""
        size = self._flags.kv_bytes_per_token
        if announced != (end - start) * size:
            raise WireError(f"expected {(end - start) * size} KV bytes, offered {announced}")
        state = State(self._flags.served_name).feed_all(ids[:start])
        for first in range(start, end, _TOKENS_PER_CHECK):
            chunk = ids[first : min(first + _TOKENS_PER_CHECK, end)]
            expected = zlib.crc32(kv_chunk(state, chunk, size))
            if await _checksum(peer.reader, len(chunk) * size) != expected:
                raise WireError(f"wrong checksum of KV blocks at token {first}")
        return announced

    async def _notify(self, params: Mapping[str, Any]) -> None:
        request_id = str(params["remote_request_id"])
        try:
            async with self._connect(params) as peer:
                await peer.call("done", request_id=request_id)
        except Failure as error:
            self._count_failed_notification(request_id, error)

    def _count_failed_notification(self, request_id: str, error: BaseException) -> None:
        log.error("Failed to notify the prefill engine about request %s: %s", request_id, error)
        self._metrics.failed_notifications.inc()
        self._metrics.failed_transfers.inc()

    async def _send_heartbeats(self) -> None:
        """Every sixth of a lease, while sequences wait for their blocks."""
        while self._tracked:
            await asyncio.sleep(self._flags.kv_lease / 6)
            engines: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
            for params in self._tracked.values():
                _, ids = engines.setdefault(params["remote_engine_id"], (params, []))
                ids.append(params["remote_request_id"])
            for params, ids in engines.values():
                try:
                    async with self._connect(params) as peer:
                        await peer.call("heartbeat", request_ids=ids)
                except Failure as error:
                    log.warning("Failed to send heartbeat to %s: %s", params["remote_engine_id"], error)
        self._heartbeat = None

    @asynccontextmanager
    async def _connect(self, params: Mapping[str, Any]) -> AsyncIterator[Peer]:
        """A peer that answered the handshake. Raises what `Failure` names."""
        host, port = str(params["remote_host"]), params["remote_port"]
        if type(port) is not int or not 0 < port < 65536:
            raise WireError(f"remote_port {port!r} is no port")
        opening = asyncio.open_connection(host, port)
        reader, writer = await asyncio.wait_for(opening, _HANDSHAKE_TIMEOUT)
        try:
            peer = Peer(str(params["remote_engine_id"]), reader, writer)
            await peer.call("handshake", compatibility=compatibility(self._flags))
            yield peer
        finally:
            writer.close()


async def _checksum(reader: asyncio.StreamReader, size: int) -> int:
    """CRC-32 of the next `size` bytes."""
    value = 0
    while size:
        data = await asyncio.wait_for(reader.read(min(size, _READ_SIZE)), _STALL_TIMEOUT)
        if not data:
            raise WireError("the prefill engine closed during the transfer")
        size -= len(data)
        value = zlib.crc32(data, value)
    return value
