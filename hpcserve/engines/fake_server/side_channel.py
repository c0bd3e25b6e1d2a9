"""The wire between engines that hand over KV blocks, and its prefill side.

Frames are a 4-byte big-endian length and a msgpack map. A request has `op` (`handshake`, `pull`,
`done`, `heartbeat`) and the `engine_id` it is meant for; an answer has `ok`, and `error` when it is
false. A pull's answer has `bytes`, and that many raw bytes follow.

Blocks of a finished prefill are held under a lease of `kv_lease` seconds, which a heartbeat extends to
two thirds of it from now, as vLLM's NIXL connector does. One thing differs from NIXL on purpose: reading
blocks whose lease has expired fails, where a real engine would read blocks that may be in use again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .failures import Failures
from .flags import Flags
from .kv_cache import BlockPool
from .language import State, kv_chunk
from .metrics import Metrics

log = logging.getLogger(__name__)

_LARGEST_FRAME = 1 << 20
_TOKENS_PER_WRITE = 256


class WireError(Exception):
    """The peer closed, or sent something that is not a frame."""


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next frame. Raises WireError."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > _LARGEST_FRAME:
            raise WireError(f"frame of {size} bytes")
        frame = msgspec.msgpack.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError) as error:
        raise WireError(str(error) or type(error).__name__) from error
    if not isinstance(frame, dict):
        raise WireError("frame is not a map")
    return frame


def frame_bytes(frame: Mapping[str, Any]) -> bytes:
    body = msgspec.msgpack.encode(frame)
    return len(body).to_bytes(4, "big") + body


def compatibility(flags: Flags) -> str:
    """Hash of what prefill and decode must have in common; the model's path is part of it, as in vLLM."""
    return hashlib.sha256(f"{flags.model}\0{flags.kv_bytes_per_token}".encode()).hexdigest()


@dataclass(slots=True, kw_only=True)
class Lease:
    """Blocks that wait for the decode side; `expires` is loop time."""

    blocks: list[int]
    ids: list[int]
    expires: float


class SideChannel:
    """Holds finished prefills' blocks and serves them."""

    def __init__(
        self,
        flags: Flags,
        pool: BlockPool,
        metrics: Metrics,
        failures: Failures,
        on_free: Callable[[], None],
        rank: int = 0,
    ) -> None:
        self.engine_id = f"{uuid.uuid4()}_dp{rank}" if flags.data_parallel_size > 1 else str(uuid.uuid4())
        self.host = flags.host
        # 0 lets the system choose.
        self.port = flags.side_channel_port + rank if flags.side_channel_port else 0
        self._flags = flags
        self._pool = pool
        self._metrics = metrics
        self._failures = failures
        self._on_free = on_free
        self._leases: dict[str, Lease] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._peers: set[asyncio.StreamWriter] = set()

    @property
    def held(self) -> int:
        """Prefills that wait for the decode side."""
        return len(self._leases)

    async def idle(self) -> None:
        """Wait until no prefill is left to be pulled."""
        await self._idle.wait()

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
        for writer in self._peers:
            writer.close()

    def hold(self, request_id: str, blocks: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
        """Keep blocks for the decode side; the result is the response's `kv_transfer_params`."""
        expires = asyncio.get_running_loop().time() + self._flags.kv_lease
        self._leases[request_id] = Lease(blocks=list(blocks), ids=list(ids), expires=expires)
        self._idle.clear()
        self._arm(expires)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(blocks)],
            "remote_engine_id": self.engine_id,
            "remote_request_id": request_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(ids),
            # vLLM fills this in only for blocks that a decode engine keeps.
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }

    # Leases.

    def _arm(self, when: float) -> None:
        """One timer for all leases, set to the first that may end."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for request_id, lease in list(self._leases.items()):
            if lease.expires <= now:
                log.warning("Releasing expired KV blocks for request %s", request_id)
                self._metrics.expired_requests.inc()
                self._free(request_id)
        if self._leases:
            self._arm(min(lease.expires for lease in self._leases.values()))

    def _free(self, request_id: str) -> None:
        self._pool.release(self._leases.pop(request_id).blocks)
        if not self._leases:
            self._idle.set()
        self._on_free()

    def _extend(self, request_ids: Sequence[str]) -> None:
        expires = asyncio.get_running_loop().time() + self._flags.kv_lease * 2 / 3
        for request_id in request_ids:
            lease = self._leases.get(request_id)
            if lease is not None:
                lease.expires = max(lease.expires, expires)

    # The wire.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        try:
            while True:
                await self._answer(await read_frame(reader), writer)
        except (WireError, ConnectionError):
            pass  # a peer that goes away is normal: its leases expire
        except (KeyError, TypeError, ValueError) as error:
            log.warning("Connection listener got unexpected message: %r", error)
        finally:
            self._peers.discard(writer)
            writer.close()

    async def _answer(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        if request.get("engine_id") != self.engine_id:
            self._refuse(writer, f"engine id is {self.engine_id}, expected {request.get('engine_id')}")
            return
        match request.get("op"):
            case "handshake":
                if request.get("compatibility") != compatibility(self._flags):
                    self._refuse(writer, "model paths or KV layouts differ")
                    return
            case "heartbeat":
                self._extend(request["request_ids"])
            case "done":
                self._done(str(request["request_id"]))
            case "pull":
                await self._send_blocks(request, writer)
                return
            case op:
                self._refuse(writer, f"unknown operation {op}")
                return
        writer.write(frame_bytes({"ok": True}))

    @staticmethod
    def _refuse(writer: asyncio.StreamWriter, error: str) -> None:
        writer.write(frame_bytes({"ok": False, "error": error}))

    def _done(self, request_id: str) -> None:
        if request_id in self._leases:
            self._free(request_id)
            return
        log.warning("Potentially invalid KV blocks for unrecognized request %s were retrieved", request_id)
        self._metrics.notifications_after_expiry.inc()

    async def _send_blocks(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        lease = self._leases.get(str(request["request_id"]))
        if self._failures.drops_transfer():
            raise ConnectionError("dropped on command")
        if lease is None:
            self._refuse(writer, f"no KV blocks for request {request['request_id']}")
            return
        start, end = int(request["start"]), min(int(request["end"]), len(lease.ids))
        size = self._flags.kv_bytes_per_token
        writer.write(frame_bytes({"ok": True, "bytes": max(0, end - start) * size}))
        ids = lease.ids
        state = State(self._flags.served_name).feed_all(ids[:start])
        for first in range(start, end, _TOKENS_PER_WRITE):
            writer.write(kv_chunk(state, ids[first : min(first + _TOKENS_PER_WRITE, end)], size))
            await writer.drain()
