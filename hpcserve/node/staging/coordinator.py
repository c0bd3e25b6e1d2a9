"""Rank 0's side of staging: asks all nodes what they have, decides for all of them, and watches.

Either every node has the whole model at the same path, or every engine loads from the shared one.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from ...errors import HpcserveError, JobError
from ...rundir.atomic import write_json
from ..console import say
from ..discovery.facts import RankFacts, Roster
from ..frames import HELLO_TIMEOUT, Channel, Failed, WrongKey, accept
from ..inputs import Inputs
from ..journal import Journal
from ..ports import listen
from .source import Listing, list_model
from .thread import in_thread
from .trouble import NotStaged
from .worker import BEAT, MAX_FRAME, coordinator_file, port_range

JOIN_WAIT = 120.0
"""Seconds for every rank to report; the rendezvous has just shown that all nodes are there."""
SILENT = 30.0
"""Seconds without a word after which a node is lost."""
STALLED = 300.0
"""Seconds in which no byte moves anywhere after which the broadcast is given up."""
_TICK = 0.5
_REPORT = 5.0
"""Seconds between two `staging` events."""
_REASONS = 2.0
"""Seconds for other nodes to say why, when one lost its neighbour."""
_IN_USE = 5
"""Looks at a copy that is damaged and in use before it is called that."""


class Peer:
    """A rank as the coordinator sees it."""

    def __init__(self, facts: RankFacts, channel: Channel) -> None:
        self.rank = facts.rank
        self.node = facts.node
        self.address = facts.address
        self.channel = channel
        self.heard = time.monotonic()
        self.gone = False
        self.joined: Mapping[str, Any] = {}
        self.reply: Mapping[str, Any] | None = None
        """Its answer to what was asked last."""
        self.failed: Mapping[str, Any] | None = None
        self.counts = (0, 0, 0)
        """Bytes of the model on the node; read from the shared file system; received."""

    def order(self, do: str, **fields: Any) -> None:
        self.reply = None
        self.channel.put({"do": do, **fields})

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node})"


class Coordinator:
    """Use once, beside rank 0's own worker."""

    def __init__(self, inputs: Inputs, roster: Roster, journal: Journal) -> None:
        self._inputs = inputs
        self._roster = roster
        self._journal = journal
        self._peers: dict[int, Peer] = {}
        self._news = asyncio.Event()
        self._began = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._total = 0
        self._waits_for: str | None = None
        self._moved = (0, time.monotonic())
        """The sum of all counts, and when it last changed."""
        self._last = (0, time.monotonic())
        """Bytes on the node that has least, and when, at the last report."""

    async def run(self) -> str:
        """The copy's path.

        Raises NotStaged when all must use the shared one, JobError or StorageError when the run is over.
        """
        listening = listen(port_range(self._inputs, "control"), self._roster.ranks[0].address)
        listening.setblocking(False)
        server = await asyncio.start_server(self._accept, sock=listening)
        host, port = listening.getsockname()[:2]
        place = coordinator_file(self._inputs)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(place, {"attempt": self._inputs.attempt, "address": host, "port": port})
        heart = asyncio.create_task(self._beat())
        try:
            path = await self._stage()
        except HpcserveError as error:
            for peer in self._peers.values():
                soft = isinstance(error, NotStaged)
                peer.order("abort", message=error.message, hint=error.hint, soft=soft)
            raise
        else:
            for peer in self._peers.values():
                peer.order("end")
            return path
        finally:
            # Who lost the way to this node sees by it that it ended.
            with suppress(OSError):
                place.unlink(missing_ok=True)
            heart.cancel()
            await self._flush()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _beat(self) -> None:
        """Nobody has anything to hear for long, and a node without power sends no end of its connections."""
        while True:
            for peer in self._peers.values():
                peer.channel.put({"do": "beat"})
            await asyncio.sleep(BEAT)

    async def _flush(self) -> None:
        for peer in self._peers.values():
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await peer.channel.drain()

    # What is decided.

    async def _stage(self) -> str:
        everybody = range(len(self._roster.ranks))
        await self._until(lambda: all(self._has_joined(rank) for rank in everybody), self._check_joined)
        peers = [self._peers[rank] for rank in everybody]
        for peer in peers:
            if peer.joined.get("refused"):
                raise _refused(peer, peer.joined["refused"])
        roots = {str(peer.joined["root"]) for peer in peers}
        if len(roots) > 1:
            raise NotStaged(
                f"storage.node_local is not the same path on all nodes: {', '.join(sorted(roots)[:4])}",
                hint="prefill and decode engines need the byte-identical path: choose a `storage.node_local`"
                " that is the same everywhere",
            )
        listing = await self._list()
        self._total = listing.size
        told = msgspec.to_builtins(listing)
        # Ranks that see one directory (several on one machine) need one copy between them.
        first: dict[str, Peer] = {}
        for peer in peers:
            first.setdefault(str(peer.joined["identity"]), peer)
        ring = list(first.values())
        guests = [peer for peer in peers if peer not in ring]
        offers = await self._offers(ring, told)
        if any(offer["claim"] == "ours" for offer in offers):
            await self._broadcast(ring, offers)
        for offer in await self._offers(guests, told) if guests else ():
            if offer["claim"] != "complete":
                raise NotStaged("a rank of one machine does not see the copy that another made there")
        reused = sum(offer["claim"] == "complete" for offer in offers)
        self._tell_end(str(offers[0]["path"]), len(ring), reused)
        return str(offers[0]["path"])

    async def _list(self) -> Listing:
        """Nodes and time are watched meanwhile. Raises StorageError."""
        self._waits_for = "the model's directory is still being listed"
        listing = asyncio.create_task(in_thread(list_model, self._inputs.plan.model.model))
        listing.add_done_callback(lambda _: self._news.set())
        try:
            await self._until(listing.done, lambda: None)
            self._waits_for = None
            return listing.result()
        finally:
            listing.cancel()

    async def _offers(self, peers: list[Peer], listing: Any) -> list[Mapping[str, Any]]:
        """What each has and may write; waits while other jobs of the user write the same copy."""
        in_use = 0
        waiting: set[str] = set()
        while True:
            for peer in peers:
                peer.order("offer", listing=listing)
            offers = await self._replies(peers)
            claims = {peer.node: str(offer["claim"]) for peer, offer in zip(peers, offers, strict=True)}
            if not {"staging", "in use"} & set(claims.values()):
                self._waits_for = None
                return offers
            in_use = in_use + 1 if "in use" in claims.values() else 0
            if in_use > _IN_USE:
                nodes = ", ".join(node for node, claim in claims.items() if claim == "in use")
                raise NotStaged(
                    f"the copy on {nodes} is not what was staged, and another job of yours uses it",
                    hint="stop that job, or wait for its end; who changed files there?",
                )
            # Two jobs that wait for each other's nodes would wait for ever: both let go, and come again.
            for peer in peers:
                peer.order("release")
            busy = {node for node, claim in claims.items() if claim == "staging"}
            if busy - waiting:
                waiting |= busy
                self._waits_for = f"another job of yours stages it on {', '.join(sorted(busy))}"
                say(f"staging: {self._waits_for}; waiting")
            await self._pause(random.uniform(1.0, 4.0))
            self._check_peers()

    async def _broadcast(self, ring: list[Peer], offers: list[Mapping[str, Any]]) -> None:
        told = [
            {"rank": peer.rank, "address": peer.address, "port": peer.joined["port"], "held": offer["held"]}
            for peer, offer in zip(ring, offers, strict=True)
        ]
        self._moved = (0, time.monotonic())
        self._last = (0, time.monotonic())
        name = secrets.token_hex(8)
        for peer in ring:
            peer.order("go", ring=told, name=name)
        await self._until(lambda: all(peer.reply for peer in ring), lambda: self._watch(ring))

    def _watch(self, ring: list[Peer]) -> None:
        now = time.monotonic()
        moved = sum(sum(peer.counts) for peer in ring)
        if moved != self._moved[0]:
            self._moved = (moved, now)
        elif now - self._moved[1] > STALLED:
            raise NotStaged(
                f"no byte of the model moved for {STALLED:g} s; {self._progress(ring)}",
                hint="the shared file system hangs, or a link between nodes passes small packets only",
            )
        if now - self._last[1] >= _REPORT:
            least = min(peer.counts[0] for peer in ring)
            rate = (least - self._last[0]) / (now - self._last[1])
            self._journal.write("staging", bytes=least, total=self._total, rate=round(max(0.0, rate)))
            self._last = (least, now)

    def _progress(self, peers: Iterable[Peer]) -> str:
        if self._waits_for is not None:
            return self._waits_for
        slowest = min(peers, key=lambda peer: peer.counts[0], default=None)
        if slowest is None:
            return "nothing was begun"
        gib = 1 << 30
        return f"{slowest} has {slowest.counts[0] / gib:.1f} of {self._total / gib:.1f} GiB"

    def _tell_end(self, path: str, nodes: int, reused: int) -> None:
        peers = self._peers.values()
        read, seconds = sum(peer.counts[1] for peer in peers), round(time.monotonic() - self._began, 3)
        self._journal.write(
            "staged", path=path, bytes=self._total, seconds=seconds, read=read, nodes=nodes, reused=reused
        )
        say(
            f"staged: {path} on {nodes} nodes in {seconds:.1f} s, {reused} of them had it;"
            f" {read} bytes read from {self._inputs.plan.model.model}"
        )

    # Waiting.

    async def _replies(self, peers: list[Peer]) -> list[Mapping[str, Any]]:
        await self._until(lambda: all(peer.reply for peer in peers), lambda: None)
        return [peer.reply for peer in peers if peer.reply is not None]

    async def _until(self, condition: Callable[[], bool], check: Callable[[], None]) -> None:
        while not condition():
            await self._check_failed()
            self._check_peers()
            check()
            await self._pause(_TICK)
        await self._check_failed()

    async def _pause(self, seconds: float) -> None:
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _has_joined(self, rank: int) -> bool:
        return rank in self._peers and bool(self._peers[rank].joined)

    def _check_joined(self) -> None:
        if time.monotonic() - self._began > JOIN_WAIT:
            absent = [facts for facts in self._roster.ranks if not self._has_joined(facts.rank)]
            names = ", ".join(f"{facts.rank} ({facts.node})" for facts in absent[:8])
            raise JobError(
                f"no word from ranks {names} within {JOIN_WAIT:g} s of staging",
                hint="logs/staging-RANK.log says how far they got; a firewall between nodes looks like this",
            )

    def _check_peers(self) -> None:
        now = time.monotonic()
        lost = [peer for peer in self._peers.values() if peer.gone or now - peer.heard > SILENT]
        if lost:
            raise JobError(
                f"lost {', '.join(map(str, lost[:4]))} while the model was staged",
                hint="logs/staging-RANK.log and `sacct` tell why; launch again: what the others have is kept",
            )
        limit = self._inputs.plan.ready_timeout
        if now - self._began > limit:
            far = self._progress(self._peers.values())
            raise JobError(
                f"the model was not staged within ready_timeout ({limit} s): {far}",
                hint="raise `ready_timeout` in model.yaml; the next launch goes on with what is there",
            )

    async def _check_failed(self) -> None:
        if not any(peer.failed for peer in self._peers.values()):
            return
        # One node's trouble cuts its neighbours' connections: the reason may come after their words.
        deadline = time.monotonic() + _REASONS
        while all(peer.failed["secondary"] for peer in self._peers.values() if peer.failed):
            if time.monotonic() > deadline:
                break
            self._check_peers()
            await self._pause(0.1)
        failed = [peer for peer in self._peers.values() if peer.failed]
        failed.sort(key=lambda peer: (peer.failed["soft"], peer.failed["secondary"]) if peer.failed else ())
        assert failed[0].failed is not None, "it is one of those that failed"
        raise _refused(failed[0], failed[0].failed)

    # What comes in.

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "it runs in one"
        self._tasks.add(task)
        peer: Peer | None = None
        try:
            peer = await self._greet(reader, writer)
            while True:
                self._hear(peer, await peer.channel.receive())
        except (*Failed, WrongKey):
            # A stranger, or a rank that died, or one that was told to end.
            if peer is not None:
                peer.gone = True
        finally:
            self._tasks.discard(task)
            self._news.set()
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer:
        key, attempt = self._inputs.job_key.encode(), self._inputs.attempt
        channel = await accept(reader, writer, key=key, attempt=attempt, most=MAX_FRAME)
        async with asyncio.timeout(HELLO_TIMEOUT):
            rank = (await channel.receive())["rank"]
        if rank in self._peers or rank not in range(len(self._roster.ranks)):
            raise ValueError("no such rank, or it came before")
        channel.put({"welcome": True})
        peer = self._peers[rank] = Peer(self._roster.ranks[rank], channel)
        return peer

    def _hear(self, peer: Peer, message: Mapping[str, Any]) -> None:
        peer.heard = time.monotonic()
        if "counts" in message:
            present, read, received = message["counts"]
            peer.counts = (int(present), int(read), int(received))
        match message["kind"]:
            case "join":
                peer.joined = message
            case "offer" | "done":
                peer.reply = message
            case "failed":
                peer.failed = message
        if message["kind"] != "beat":
            self._news.set()


def _refused(peer: Peer, told: Mapping[str, Any]) -> HpcserveError:
    kind = NotStaged if told["soft"] else JobError
    return kind(f"{peer}: {told['message']}", hint=str(told["hint"]))
