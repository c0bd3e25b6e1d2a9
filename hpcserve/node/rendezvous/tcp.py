"""Rendezvous over TCP, for sites without a usable MPI.

Rank 0 listens on a port of the site's range and publishes it in ranks/0.json; both sides prove that
they know the job's key before anything counts. Frames are a 4-byte big-endian length and JSON:

    rank 0 -> R   {"attempt", "nonce"}
    R -> rank 0   {"rank", "nonce", "facts", "mac"}     mac over both nonces and the facts
    rank 0 -> R   {"verdict", "mac"} or {"refused"}     mac over both nonces and the verdict
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from contextlib import suppress

import msgspec

from ...errors import RendezvousError
from ..console import say
from ..discovery.facts import RankFacts, facts_from_json, to_json
from ..frames import HELLO_TIMEOUT, MAX_FRAME, Failed, mac, receive, send
from ..ports import PortRange, ephemeral_range, listen
from ..rank import node_names
from .meeting import Attendance, Meeting, Verdict, verdict_from_json


def port_range(meeting: Meeting) -> PortRange:
    """The same order of ports on every rank, so that rank 0's port can be guessed."""
    ports = meeting.plan.site.ports
    return PortRange(
        low=ports.low, high=ports.high, seed=f"rendezvous {meeting.attempt}", ephemeral=ephemeral_range()
    )


def meet(meeting: Meeting, facts: RankFacts, attendance: Attendance) -> Verdict:
    """Exchange facts. Raises RendezvousError when a rank stays away or the key is wrong."""
    if meeting.rank != 0:
        return asyncio.run(join(meeting, facts, attendance))
    with listen(port_range(meeting), facts.address) as listening:
        meeting.announce(address=facts.address, port=listening.getsockname()[1])
        return asyncio.run(Host(meeting, facts, attendance).run(listening))


class Host:
    """Rank 0's side."""

    def __init__(self, meeting: Meeting, facts: RankFacts, attendance: Attendance) -> None:
        self._meeting = meeting
        self._found = [facts]
        self._attendance = attendance
        self._refused: set[str] = set()
        self._complete = asyncio.Event()

    async def run(self, listening: socket.socket) -> Verdict:
        self._verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count()
        server = await asyncio.start_server(self._accept, sock=listening, limit=MAX_FRAME + 4)
        verdict = await self._decide()
        self._verdict.set_result(verdict)
        server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HELLO_TIMEOUT)
        return verdict

    async def _decide(self) -> Verdict:
        try:
            while not self._complete.is_set():
                self._attendance.look()
                if self._meeting.left() <= 0:
                    return Verdict.of(self._named())
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(0.2, self._meeting.left())):
                        await self._complete.wait()
            self._attendance.record()
        except RendezvousError as error:
            return Verdict.of(error)
        return self._meeting.conclude(self._found)

    def _named(self) -> RendezvousError:
        error = self._meeting.missing()
        if self._refused:
            return RendezvousError(
                f"{error.message}; refused for a wrong job key: {', '.join(sorted(self._refused))}",
                hint="all ranks must read the same secrets/job-key: do they see the same run directory?",
            )
        return error

    def _count(self) -> None:
        # A rank that comes twice is not counted out here: the check names it.
        if len(self._found) >= self._meeting.size:
            self._complete.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._talk(reader, writer)
        except Failed:
            # A port scanner, or a rank that died; a dead rank is named when the time is up.
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_hex(16)
        send(writer, {"attempt": self._meeting.attempt, "nonce": nonce})
        async with asyncio.timeout(HELLO_TIMEOUT):
            join = await receive(reader)
        nonces = f"{nonce} {join['nonce']}"
        facts = join["facts"]
        if not hmac.compare_digest(join["mac"], mac(self._meeting.key, "join", nonces, facts)):
            peer = str(writer.get_extra_info("peername")[0])
            self._refused.add(peer)
            say(f"rendezvous: refused {peer}: wrong job key")
            send(writer, {"refused": "wrong job key"})
            await writer.drain()
            return
        self._found.append(facts_from_json(facts))
        self._count()
        verdict = msgspec.to_builtins(await self._verdict)
        send(writer, {"verdict": verdict, "mac": mac(self._meeting.key, "verdict", nonces, verdict)})
        await writer.drain()


async def join(meeting: Meeting, facts: RankFacts, attendance: Attendance) -> Verdict:
    """The side of ranks 1 and up. Raises RendezvousError when rank 0 stays away or refuses the key."""
    delay = 0.05
    while meeting.left() > 0:
        published = meeting.announced(0) or {}
        address, port = published.get("address"), published.get("port")
        trusted = address is not None and port is not None
        if not trusted:
            address, port = _guess(meeting)
        if address is not None and port is not None:
            verdict = await _try(meeting, facts, address, port, trusted=trusted)
            if verdict is not None:
                return verdict
        attendance.look()
        await asyncio.sleep(min(delay, meeting.left()))
        delay = min(delay * 1.5, 1.0)
    raise meeting.missing()


def _guess(meeting: Meeting) -> tuple[str | None, int | None]:
    """Where rank 0 most likely listens while its file is not visible on this node yet."""
    names = node_names(meeting.environ)
    host = meeting.environ.get("SLURM_LAUNCH_NODE_IPADDR") or (names[0] if names else None)
    return host, next(iter(port_range(meeting).candidates()), None)


async def _try(
    meeting: Meeting, facts: RankFacts, address: str, port: int, *, trusted: bool
) -> Verdict | None:
    """One attempt; None when it is worth another. Only a published address may refuse for good."""
    try:
        async with asyncio.timeout(min(5.0, meeting.left())):
            reader, writer = await asyncio.open_connection(address, port, limit=MAX_FRAME + 4)
    except Failed:
        return None
    try:
        async with asyncio.timeout(min(HELLO_TIMEOUT, meeting.left())):
            hello = await receive(reader)
        if hello["attempt"] != meeting.attempt:
            return None
        nonce = secrets.token_hex(16)
        nonces, told = f"{hello['nonce']} {nonce}", to_json(facts)
        proof = mac(meeting.key, "join", nonces, told)
        send(writer, {"rank": meeting.rank, "nonce": nonce, "facts": told, "mac": proof})
        # Rank 0 answers at its own deadline; its message is better than ours.
        async with asyncio.timeout(meeting.left() + HELLO_TIMEOUT):
            answer = await receive(reader)
        if "verdict" in answer:
            if hmac.compare_digest(answer["mac"], mac(meeting.key, "verdict", nonces, answer["verdict"])):
                return verdict_from_json(answer["verdict"])
            return None
    except Failed:
        return None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    if trusted:
        raise RendezvousError(
            f"rank 0 at {address}:{port} refused rank {meeting.rank}: {answer.get('refused')}",
            hint="all ranks must read the same secrets/job-key: do they see the same run directory?",
        )
    return None
