"""Each rank's side of staging: does what the coordinator on rank 0 says, and tells it how far it is."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Mapping
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
from .trouble import LostNeighbour, NotStaged

BEAT = 1.0
"""Seconds between two words to the coordinator."""
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

    async def run(self) -> None:
        """Raises JobError; NotStaged when the run goes on with the shared path."""
        listening = listen(port_range(self._inputs, f"data {self._rank}"), self._facts.address)
        channel = await self._find()
        heart = asyncio.create_task(self._beat(channel))
        try:
            self._say(channel, "join", **self._look(), port=listening.getsockname()[1])
            while True:
                try:
                    order = await channel.receive()
                except (*Failed, WrongKey) as error:
                    raise JobError(
                        "lost the head node while the model was staged",
                        hint="logs/staging-0.log has what the head node said",
                    ) from error
                if not await self._obey(order, channel, listening):
                    return
        finally:
            heart.cancel()
            self._over.set()
            if self._relay is not None:
                self._relay.stop(NotStaged("staging was ended"))
            if self._task is not None:
                await asyncio.gather(self._task, return_exceptions=True)
            if self._copy is not None:
                self._copy.close()
            listening.close()
            await channel.close()

    # To the coordinator, and back.

    async def _find(self) -> Channel:
        deadline = time.monotonic() + _FIND_WAIT
        while True:
            try:
                entry = read_json(coordinator_file(self._inputs))
                if entry["attempt"] == self._inputs.attempt:
                    channel = await self._introduce(entry["address"], entry["port"])
                    if channel is not None:
                        return channel
            except (*Failed, WrongKey, StorageError):
                pass  # not there yet, or not ours
            if time.monotonic() > deadline:
                raise JobError(
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

    async def _obey(self, order: Mapping[str, Any], channel: Channel, listening: socket.socket) -> bool:
        """False when that was the last."""
        match order["do"]:
            case "offer":
                self._listing = msgspec.convert(order["listing"], Listing)
                await self._answer(channel, "offer", self._offer)
            case "release":
                self._release()
            case "go":
                self._task = asyncio.create_task(self._stage(order, channel, listening))
            case "end":
                return False
            case "abort":
                kind = NotStaged if order["soft"] else JobError
                raise kind(order["message"], hint=order["hint"])
        return True

    async def _answer(self, channel: Channel, kind: str, work: Any) -> None:
        """In a thread: file systems may hang, and the heart is to beat on."""
        try:
            fields = await asyncio.to_thread(work)
        except (HpcserveError, OSError) as error:
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
            await asyncio.to_thread(self._run_relay, order, listening)
        except (HpcserveError, OSError) as error:
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
        held = [frozenset(entry["held"]) for entry in ring]
        key, name = self._inputs.job_key.encode(), str(order["name"])
        before: list[socket.socket] = []
        after: list[socket.socket] = []
        if size > 1:
            following = ring[(here + 1) % size]
            next_one = (following["address"], following["port"])
            before, after = open_ring(listening, next_one, key, name, Place(here, size), self._over)
        place = Place(here, size)
        self._relay = Relay(copy, self._held, schedule(copy.listing.files, held), place, before, after)
        # `run` sets the one and then looks for the other, so one of the two sees it.
        if self._over.is_set():
            raise NotStaged("staging was ended")
        self._relay.run()
        if not copy.whole:
            copy.commit()


def _told(error: Exception) -> dict[str, Any]:
    hint = error.hint if isinstance(error, HpcserveError) else None
    soft = isinstance(error, NotStaged | OSError)
    return {
        "message": str(error),
        "hint": hint or "look at that path on this node",
        "soft": soft,
        "secondary": isinstance(error, LostNeighbour),
    }


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
