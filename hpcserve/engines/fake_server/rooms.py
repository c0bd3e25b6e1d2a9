"""SGLang's way for KV blocks: prefill and decode are both told of a room, and meet in it.

The wire is the side channel's, with `join` for the engine id that decode does not know. Texts of failures are
those of SGLang 0.5.23 (disaggregation/prefill.py, decode.py and common/conn.py). What differs on purpose: a
partner that goes away is noticed by its connection, where SGLang asks every 5 seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .puller import Failure, Peer, Puller
from .scheduler import LoadError
from .sequence import Sequence as Answer
from .side_channel import SideChannel, WireError, frame_bytes, read_frame

log = logging.getLogger(__name__)


def failed(stage: str, rid: str, room: int | str, why: str) -> str:
    """`stage` is such as `Prefill bootstrap`."""
    owner = "decode_req.req" if stage.startswith("Decode") else "req"
    return (
        f"{stage} failed for request rank=0 {owner}.rid='{rid}' {owner}.bootstrap_room={room}"
        f" with exception KVTransferError(bootstrap_room={room}): {why}"
    )


class Room:
    """One request's, on the prefill side."""

    def __init__(self) -> None:
        self.held = asyncio.Event()
        """Its prompt is computed."""
        self.joined = asyncio.Event()
        self.handed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Decode has all its blocks; fails with WireError."""
        self.partner: asyncio.StreamWriter | None = None


class Rooms(SideChannel):
    """The prefill side: holds blocks until decode has come for them."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.port = self._flags.bootstrap_port or 0
        self._rooms: dict[str, Room] = {}

    def _room(self, name: str) -> Room:
        # Decode may be the first to ask.
        return self._rooms.setdefault(name, Room())

    async def hand_over(self, name: str, rid: str) -> None:
        """Wait until decode has the blocks of a computed prompt. Raises WireError in SGLang's words."""
        room, seconds = self._room(name), self._flags.bootstrap_timeout
        try:
            async with asyncio.timeout(seconds):
                await room.handed
        except TimeoutError:
            state = "WaitingForInput" if room.joined.is_set() else "Bootstrapping"
            why = f"Request {name} timed out after {seconds:.1f}s in KVPoll.{state}"
            raise WireError(failed("Prefill bootstrap", rid, name, why)) from None
        except WireError as error:
            raise WireError(failed("Prefill transfer", rid, name, str(error))) from None

    def leave(self, name: str) -> None:
        """The request is over: free what it holds, and let nobody wait for it."""
        if name in self._leases:
            self._free(name)
        room = self._rooms.pop(name, None)
        if room is not None and room.partner is not None and not room.handed.done():
            room.partner.close()

    def hold(self, request_id: str, blocks: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
        super().hold(request_id, blocks, ids)
        self._room(request_id).held.set()
        return {}

    def _arm(self, when: float) -> None:
        """Blocks have no lease: `hand_over` gives them up."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        room: Room | None = None
        try:
            request = await read_frame(reader)
            name = str(request.get("room"))
            room = self._room(name)
            room.partner = writer
            room.joined.set()
            await self._until_held(room, reader)
            writer.write(frame_bytes({"ok": True}))
            while request.get("op") != "done":
                request = await read_frame(reader)
                await self._answer({**request, "engine_id": self.engine_id, "request_id": name}, writer)
            if not room.handed.done():
                room.handed.set_result(None)
        except (WireError, ConnectionError) as error:
            if room is not None and not room.handed.done():
                room.handed.set_exception(WireError(str(error)))
                # Read also where nobody waits for it any more.
                room.handed.exception()
        finally:
            self._peers.discard(writer)
            writer.close()

    async def _until_held(self, room: Room, reader: asyncio.StreamReader) -> None:
        held = asyncio.ensure_future(room.held.wait())
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((held, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            held.cancel()
            gone.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await gone
        if not room.held.is_set():
            raise WireError("Aborted by AbortReq.")

    async def _send_blocks(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        lease = self._leases.get(str(request["request_id"]))
        began = asyncio.get_running_loop().time()
        await super()._send_blocks(request, writer)
        if lease is not None:
            tokens = min(int(request["end"]), len(lease.ids)) - int(request["start"])
            self._metrics.transferred(
                seconds=asyncio.get_running_loop().time() - began, posted=0.0,
                size=tokens * self._flags.kv_bytes_per_token, descriptors=len(lease.blocks),
            )  # fmt: skip


class RoomPuller(Puller):
    """The decode side: waits in the room for the blocks."""

    def track(self, sequence: Answer) -> None:
        """There are no leases to keep alive."""

    def notify_params(self, params: Mapping[str, Any]) -> None:
        """Prefill hears of it by the connection, and from the router."""

    async def load(self, sequence: Answer, start: int, end: int) -> None:
        params, rid = sequence.kv_params, sequence.request_id
        room, seconds = params["room"], self._flags.bootstrap_timeout
        host, port = str(params["bootstrap_host"]), params["bootstrap_port"]
        stage, why = (
            "Decode handshake",
            f"Could not fetch prefill parallel info from bootstrap_addr: {host}:{port}",
        )
        try:
            async with asyncio.timeout(seconds):
                if self._failures.drops_transfer():
                    raise WireError("dropped on command")
                reader, writer = await asyncio.open_connection(host, port)
                stage = "Decode transfer"
                why = f"Lost connection with prefill instance (bootstrap_addr: {host}:{port})"
                try:
                    await self._meet(sequence, Peer(None, reader, writer), start, end)
                finally:
                    writer.close()
        except Failure as error:
            if isinstance(error, TimeoutError):
                why = f"Request {room} timed out after {seconds:.1f}s in KVPoll.WaitingForInput"
            self._metrics.failed_transfers.inc()
            told = failed(stage, rid, room, why)
            log.error("%s", told)
            raise LoadError(str(error), told=told) from error

    async def _meet(self, sequence: Answer, peer: Peer, start: int, end: int) -> None:
        # For as long as `load` has patience: the prompt may have to wait for its turn.
        await peer.call("join", patience=None, room=sequence.kv_params["room"])
        answer = await peer.call("pull", start=start, end=end)
        await self._receive(peer, sequence.tokens, start, end, int(answer["bytes"]))
        await peer.call("done")
