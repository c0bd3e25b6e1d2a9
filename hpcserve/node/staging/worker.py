"""Each rank's side of staging: does what the coordinator on rank 0 says, and tells it how far it is."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ...errors import HpcserveError, JobError, StorageError
from ...rundir.atomic import read_json
from ..console import say
from ..discovery.facts import Roster
from ..frames import Channel, Failed, WrongKey, connect
from ..inputs import Inputs
from ..ports import PortRange, ephemeral_range, listen
from .copy import Copy
from .links import Place, open_ring
from .relay import Relay
from .schedule import schedule
from .source import Listing
from .store import IN_MEMORY, SHARED, Store, memory_for_files
from .thread import in_thread
from .trouble import LostHead, LostNeighbour, NotStaged

BEAT = 1.0
"""Seconds between two words to the coordinator, and from it."""
HEAD_SILENT = 120.0
"""Seconds without a word after which the head node is lost. Longer than the coordinator's own patience:
between two words it writes to the run's directory, and a shared file system may hold it up."""
SETTLE = 10.0
"""Seconds for what is still done on this node when all is over; longer where a file system hangs."""
_FIND_WAIT = 90.0
"""Seconds for the coordinator's address to be visible, and to take a connection."""
_HELLO = 30.0
_LEAST_MARGIN = 64 << 20
MAX_FRAME = 16 << 20
"""Bytes of a message: a listing of some ten thousand files."""


def coordinator_file(inputs: Inputs) -> Path:
    """Where rank 0 writes its address."""
    return inputs.run.path / "rendezvous" / "staging.json"


def port_range(inputs: Inputs, what: str) -> PortRange:
    ports = inputs.plan.site.ports
    seed = f"staging {inputs.run.path} {inputs.attempt} {what}"
    return PortRange(low=ports.low, high=ports.high, seed=seed, ephemeral=ephemeral_range())


class Worker:
    """Use once. `run` returns when the coordinator says that all is over, and raises what it aborts for."""

    def __init__(self, inputs: Inputs, roster: Roster, rank: int) -> None:
        self._inputs = inputs
        self._facts = roster.ranks[rank]
        self._rank = rank
        self._store: Store | None = None
        self._copy: Copy | None = None
        self._held: frozenset[int] = frozenset()
        self._relay: Relay | None = None
        self._over = threading.Event()
        self._listing: Listing | None = None
        self._task: asyncio.Task[None] | None = None
        self.head: tuple[str, int] | None = None
        """Address and port of the coordinator, once it told them."""

    async def run(self) -> None:
        """Raises JobError, LostHead when it may be the head node that died; NotStaged when the run goes on
        with the shared path."""
        listening = listen(port_range(self._inputs, f"data {self._rank}"), self._facts.address)
        port = listening.getsockname()[1]
        try:
            channel = await self._find()
        except BaseException:
            listening.close()
            raise
        heart = asyncio.create_task(self._beat(channel))
        try:
            self._do(self._answer(channel, "join", lambda: {**self._look(), "port": port}))
            while self._obey(await self._order(channel), channel, listening):
                pass
        finally:
            heart.cancel()
            self._over.set()
            if self._relay is not None:
                self._relay.stop(NotStaged("staging was ended"))
            if await self._at_rest():
                self._release()
            listening.close()
            await channel.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """One thing after the other, beside listening: the coordinator may have enough of it."""
        self._task = asyncio.create_task(work)

    async def _at_rest(self) -> bool:
        """False when a thread does not end; then the copy stays locked until the process ends."""
        if self._task is None:
            return True
        await asyncio.wait({self._task}, timeout=SETTLE)
        if not self._task.done():
            say(f"staging: a file system holds this node up for more than {SETTLE:g} s; it is not waited for")
        return self._task.done()

    # To the coordinator, and back.

    async def _find(self) -> Channel:
        deadline = time.monotonic() + _FIND_WAIT
        while True:
            try:
                entry = read_json(coordinator_file(self._inputs))
                if entry["attempt"] == self._inputs.attempt:
                    self.head = (entry["address"], entry["port"])
                    channel = await self._introduce(entry["address"], entry["port"])
                    if channel is not None:
                        return channel
            except (*Failed, WrongKey, StorageError):
                pass  # not there yet, or not ours
            if time.monotonic() > deadline:
                raise (JobError if self.head else LostHead)(
                    f"rank {self._rank} ({self._facts.node}) can't reach the head node to stage the model",
                    hint="logs/staging-0.log says how far that is; a firewall between nodes looks like this",
                )
            with suppress(OSError):
                os.listdir(coordinator_file(self._inputs).parent)  # makes an NFS client notice new files
            await asyncio.sleep(0.1)

    async def _introduce(self, address: str, port: int) -> Channel | None:
        """A channel to a coordinator that is ours. Raises one of `Failed`, or WrongKey."""
        attempt, key = self._inputs.attempt, self._inputs.job_key.encode()
        channel = await connect(address, port, key=key, attempt=attempt, seconds=_HELLO, most=MAX_FRAME)
        if channel is None:
            return None
        try:
            channel.put({"rank": self._rank})
            async with asyncio.timeout(_HELLO):
                await channel.receive()
        except BaseException:
            await channel.close()
            raise
        return channel

    def _say(self, channel: Channel, kind: str, **fields: Any) -> None:
        channel.put({"kind": kind, **fields})

    async def _beat(self, channel: Channel) -> None:
        while True:
            relay = self._relay
            counts = [relay.present, relay.read, relay.received] if relay else [0, 0, 0]
            self._say(channel, "beat", counts=counts)
            await asyncio.sleep(BEAT)

    async def _order(self, channel: Channel) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(HEAD_SILENT):
                return await channel.receive()
        except (*Failed, WrongKey) as error:
            raise LostHead(
                "lost the head node while the model was staged",
                hint="logs/staging-0.log has what the head node said",
            ) from error

    def _obey(self, order: Mapping[str, Any], channel: Channel, listening: socket.socket) -> bool:
        """False when that was the last."""
        match order["do"]:
            case "beat":
                pass
            case "offer":
                self._listing = msgspec.convert(order["listing"], Listing)
                self._do(self._answer(channel, "offer", self._offer))
            case "release":
                self._release()
            case "go":
                self._do(self._stage(order, channel, listening))
            case "end":
                return False
            case "abort":
                kind = NotStaged if order["soft"] else JobError
                raise kind(order["message"], hint=order["hint"])
        return True

    async def _answer(self, channel: Channel, kind: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """In a thread: file systems may hang, and the heart is to beat on."""
        try:
            fields = await in_thread(work)
        except Exception as error:
            self._say(channel, "failed", **_told(error))
            return
        self._say(channel, kind, **fields)

    # What is done.

    def _look(self) -> Mapping[str, Any]:
        try:
            self._store = Store(self._inputs.plan.site.storage.node_local)
        except NotStaged as error:
            return {"refused": _told(error)}
        identity = f"{self._facts.machine_id} {self._store.identity}"
        return {"root": str(self._store.root), "identity": identity}

    def _offer(self) -> Mapping[str, Any]:
        """What this node has of the model, and whether there is room for the rest."""
        assert self._store is not None and self._listing is not None, "asked before it joined"
        listing = self._listing
        for file in listing.files:
            if file.name.startswith("/") or ".." in file.name.split("/"):
                raise JobError(f"the head node sent a name that leads out of the copy: {file.name}")
        kind = self._store.file_system()
        if kind in SHARED:
            raise NotStaged(
                f"{self._store.root} is on a shared file system ({kind})",
                hint="set `storage.node_local` of the site to a directory on each node's own disk",
            )
        self._release()
        self._copy = copy = Copy(self._store, listing)
        claim = copy.claim()
        everything = range(len(listing.files))
        self._held = copy.prepare() if claim == "ours" else frozenset()
        if claim == "complete":
            self._held = frozenset(everything)
        missing = sum(listing.files[index].size for index in everything if index not in self._held)
        if claim == "ours":
            self._check_room(self._store, listing, missing)
        return {"claim": claim, "held": sorted(self._held), "path": str(copy.path)}

    def _check_room(self, store: Store, listing: Listing, missing: int) -> None:
        kind = store.file_system()
        if kind in IN_MEMORY:
            most = memory_for_files(self._inputs.environ)
            if missing > most:
                raise NotStaged(
                    f"{store.root} is in memory ({kind}), and the model's {_gib(missing)} are more than"
                    f" half of what is free ({_gib(2 * most)})",
                    hint="set `storage.node_local` of the site to a directory on each node's own disk",
                )
        needed = missing + max(_LEAST_MARGIN, missing // 100)
        old = store.old_copies(listing.fingerprint)
        if store.free() + sum(size for _, size in old) < needed:
            raise NotStaged(
                f"{store.root} has {_gib(store.free())} free, and the model needs {_gib(needed)} there",
                hint="free space there, or point `storage.node_local` of the site at a larger disk",
            )
        for ident in store.make_room(needed, listing.fingerprint):
            say(f"staging: removed {store.root / ident}, unused for longest, to make room")

    def _release(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    async def _stage(self, order: Mapping[str, Any], channel: Channel, listening: socket.socket) -> None:
        try:
            await in_thread(self._run_relay, order, listening)
        except Exception as error:
            self._say(channel, "failed", **_told(error))
            return
        assert self._relay is not None, "it has just run"
        relay = self._relay
        self._say(channel, "done", counts=[relay.present, relay.read, relay.received])

    def _run_relay(self, order: Mapping[str, Any], listening: socket.socket) -> None:
        copy, ring = self._copy, order["ring"]
        assert copy is not None, "it made an offer"
        size = len(ring)
        here = [entry["rank"] for entry in ring].index(self._rank)
        chunks = schedule(copy.listing.files, [frozenset(entry["held"]) for entry in ring])
        key, name = self._inputs.job_key.encode(), str(order["name"])
        before: list[socket.socket] = []
        after: list[socket.socket] = []
        if size > 1:
            following = ring[(here + 1) % size]
            next_one = (following["address"], following["port"])
            before, after = open_ring(listening, next_one, key, name, Place(here, size), self._over)
        place = Place(here, size)
        self._relay = Relay(copy, self._held, chunks, place, before, after)
        # `run` sets the one and then looks for the other, so one of the two sees it.
        if self._over.is_set():
            self._relay.stop(NotStaged("staging was ended"))
        self._relay.run()
        if not copy.whole:
            copy.commit()


def _told(error: Exception) -> dict[str, Any]:
    message, hint = str(error), "look at that path on this node"
    if isinstance(error, HpcserveError):
        hint = error.hint or hint
    elif not isinstance(error, OSError):
        say("".join(traceback.format_exception(error)))
        message, hint = (
            f"staging broke: {error!r}",
            "this is a bug in hpcserve; logs/staging-RANK.log has more",
        )
    return {
        "message": message,
        "hint": hint,
        "soft": not isinstance(error, HpcserveError) or isinstance(error, NotStaged),
        "secondary": isinstance(error, LostNeighbour),
    }


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
