"""Rank 0's part: it waits for the nodes, says who measures when, and collects what came out."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from ...plan.preflight import PREFLIGHT_TIMEOUT
from ...rundir.atomic import write_json
from ..console import say
from ..discovery.facts import Roster
from ..frames import HELLO_TIMEOUT, MAX_FRAME, Channel, Failed, WrongKey, accept
from ..inputs import Inputs
from .member import START, published
from .probes import node_name
from .records import LINK, Broken, Figure, Memory, Operation, Outcome, Pair, Probe, to_json
from .schedule import Round, rounds
from .verdict import suspects

JOIN = 60.0
"""Seconds for all nodes to say that they are there: no NIXL is needed for that."""
LIMIT = 60.0
"""Seconds of measuring after which, once a pair works, no round begins of nodes that all were in one."""
HARD_LIMIT = 180.0
"""Seconds of measuring after which no round begins at all."""
_SECOND_LOOKS = 16
OPERATION = 10.0
"""Seconds for one transfer, and about that for one operation of a pair."""
_ANSWER = 15.0
"""Seconds beyond that for the answer: the member kills a process that hangs before."""


class _Node:
    """One member's connection, and its probes' state."""

    def __init__(self, channel: Channel, node: str, probes: tuple[Probe, ...]) -> None:
        self.channel = channel
        self.node = node
        self.probes = probes
        self.gone: Broken | None = None
        self.answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.memory: dict[str, asyncio.Future[Memory]] = {}
        for probe in probes:
            self.expect(probe.name)

    def expect(self, probe: str) -> None:
        """Its process is being started."""
        self.memory[probe] = asyncio.get_running_loop().create_future()

    def fail(self, broken: Broken) -> None:
        """Nothing more comes from this node."""
        self.gone = broken
        waited: list[asyncio.Future[Any]] = [*self.answers.values(), *self.memory.values()]
        for future in waited:
            _refuse(future, broken)
        for probe in self.probes:
            self.expect(probe.name)
            _refuse(self.memory[probe.name], broken)


def _refuse(future: asyncio.Future[Any], broken: Broken) -> None:
    if not future.done():
        future.set_exception(_Refused(broken))
        future.exception()  # looked at, so that nobody warns where no pair waits for it


class _Refused(Exception):
    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.message)
        self.broken = broken


class Coordinator:
    def __init__(self, inputs: Inputs, roster: Roster) -> None:
        self._inputs = inputs
        self._roster = roster
        self._began = time.monotonic()
        self._nodes: dict[int, _Node] = {}
        self._refused: set[str] = set()
        self._news = asyncio.Event()
        self._ids = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pairs: list[Pair] = []
        self._broken: dict[str, Broken] = {}
        self._planned = 0
        self._nvlink = False
        self._starting = 0.0

    # Nodes that come.

    async def serve(self, listening: socket.socket) -> asyncio.Server:
        """Listen, and publish where."""
        server = await asyncio.start_server(self._accept, sock=listening, limit=MAX_FRAME + 4)
        path = published(self._inputs.run)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        address, port = listening.getsockname()[:2]
        write_json(path, {"attempt": self._inputs.attempt, "address": address, "port": port})
        return server

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        rank: int | None = None
        try:
            channel = await accept(
                reader, writer, key=self._inputs.job_key.encode(), attempt=self._inputs.attempt
            )
            async with asyncio.timeout(HELLO_TIMEOUT):
                hello = await channel.receive()
            rank = await self._join(channel, hello)
            while True:
                self._hear(self._nodes[rank], await channel.receive())
        except WrongKey as error:
            self._refused.add(error.message)
            say(f"preflight: refused: {error.message}")
        except Failed:
            pass  # a port scanner, or a node that died: then it is told below
        finally:
            self._tasks.discard(task)
            writer.close()
            if rank is not None:
                self._leave(rank)

    async def _join(self, channel: Channel, hello: Mapping[str, Any]) -> int:
        rank = int(hello["rank"])
        if rank in self._nodes or not 0 <= rank < self._inputs.plan.nodes:
            raise ValueError(f"rank {rank} came twice, or is none")
        probes = tuple(msgspec.convert(probe, Probe) for probe in hello["probes"])
        self._nodes[rank] = _Node(channel, str(hello["node"]), probes)
        await channel.send({"welcome": True})
        self._changed()
        return rank

    def _hear(self, node: _Node, message: Mapping[str, Any]) -> None:
        broken = msgspec.convert(message["broken"], Broken) if "broken" in message else None
        if "probe" in message:
            future: asyncio.Future[Any] = node.memory[message["probe"]]
            good: Any = None if broken else msgspec.convert(message["ready"], Memory)
            if broken is not None:
                self._broken.setdefault(node.node, broken)
        else:
            waiting = node.answers.pop(message["id"], None)
            if waiting is None:
                return  # it came too late
            future, good = waiting, message.get("answer")
        if broken is not None:
            _refuse(future, broken)
        elif not future.done():
            future.set_result(good)
        self._changed()

    def _leave(self, rank: int) -> None:
        node = self._nodes[rank]
        broken = Broken(
            cause="died",
            message=f"the preflight on {node.node} ended in the middle",
            hint=f"logs/preflight-{rank}.log has its last lines; a node that died looks like this",
        )
        self._broken.setdefault(node.node, broken)
        node.fail(broken)
        self._changed()

    def _changed(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # Measuring.

    async def run(self) -> Outcome:
        """Measure what there is time for. Cancelled, it leaves what `outcome` tells."""
        try:
            async with asyncio.timeout(PREFLIGHT_TIMEOUT):
                await self._measure_all()
        except TimeoutError:
            say(f"preflight: not over after {PREFLIGHT_TIMEOUT} s; what is still under way is left out")
        return self.outcome()

    async def _measure_all(self) -> None:
        await self._all_come()
        everybody = [probe for node in self._nodes.values() for probe in node.probes]
        plan = rounds(everybody)
        self._planned = sum(len(one.pairs) for one in plan)
        self._nvlink = any(prefill.nvlink and decode.nvlink for one in plan for prefill, decode in one.pairs)
        await self._all_ready(everybody)
        began = time.monotonic()
        self._starting = began - self._began
        for one in plan:
            gone = time.monotonic() - began
            # Until something works, every pair may be the one that does.
            works = any(pair.broken is None for pair in self._pairs)
            if gone > (LIMIT if works and not one.first else HARD_LIMIT):
                break
            await self._round(one)
        await self._look_again(began)

    async def _look_again(self, began: float) -> None:
        """Measure again, one by one, what looks slow: it may have been somebody else's burst of traffic."""
        for pair in suspects(self._pairs)[:_SECOND_LOOKS]:
            if time.monotonic() - began > LIMIT:
                return
            again = await self._pair(pair.prefill, pair.decode)
            if again is not None:
                self._pairs[self._pairs.index(pair)] = pair.better(again)

    def outcome(self, *, cut_short: bool = False) -> Outcome:
        """What is known by now."""
        return Outcome(
            pairs=tuple(sorted(self._pairs, key=lambda pair: (pair.prefill.rank, pair.decode.rank))),
            broken=dict(self._broken),
            unmeasured=self._planned - len(self._pairs),
            seconds=round(time.monotonic() - self._began, 3),
            starting=round(self._starting, 3),
            cut_short=cut_short,
            nvlink=self._nvlink,
        )

    async def dismiss(self) -> None:
        """Let the members go."""
        for node in self._nodes.values():
            try:
                async with asyncio.timeout(1.0):
                    await node.channel.send({"over": True})
            except Failed:
                continue  # it is gone
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _all_come(self) -> None:
        expected = range(self._inputs.plan.nodes)
        await self._until(lambda: all(rank in self._nodes for rank in expected), JOIN)
        refused = f"; refused: {', '.join(sorted(self._refused))}" if self._refused else ""
        for rank in expected:
            if rank not in self._nodes:
                node = node_name(self._roster, rank)
                self._broken[node] = Broken(
                    cause="silent",
                    message=f"{node} did not come to the preflight within {JOIN:g} s{refused}",
                    hint=f"does it still reach {self._roster.ranks[0].node} over TCP?"
                    f" logs/preflight-{rank}.log may say why",
                )

    async def _all_ready(self, probes: list[Probe]) -> None:
        # The members count the same seconds, and say what was not in time.
        await self._until(lambda: all(self._memory(probe).done() for probe in probes), START + _ANSWER)
        for probe in probes:
            if not self._memory(probe).done():
                self._fell_silent(probe)

    def _fell_silent(self, probe: Probe) -> None:
        """Its node would have said what keeps its process: nobody else should wait for it as long."""
        broken = Broken(
            cause="silent",
            message=f"{probe.node} did not say within {START:g} s whether NIXL is ready there",
            hint=f"does it still reach {self._roster.ranks[0].node} over TCP? A node that hangs looks so",
        )
        self._broken.setdefault(probe.node, broken)
        self._nodes[probe.rank].fail(broken)

    async def _until(self, condition: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and (left := end - time.monotonic()) > 0:
            news = self._news
            try:
                async with asyncio.timeout(left):
                    await news.wait()
            except TimeoutError:
                return

    def _memory(self, probe: Probe) -> asyncio.Future[Memory]:
        return self._nodes[probe.rank].memory[probe.name]

    async def _round(self, one: Round) -> None:
        measured = await asyncio.gather(*(self._pair(prefill, decode) for prefill, decode in one.pairs))
        self._pairs += [pair for pair in measured if pair is not None]

    async def _pair(self, prefill: Probe, decode: Probe) -> Pair | None:
        """None where one of the two can take no part: it is named for that itself."""
        try:
            for probe in (prefill, decode):
                # A process that was replaced after another pair failed may still be starting.
                async with asyncio.timeout(START + _ANSWER):
                    await asyncio.shield(self._memory(probe))
        except TimeoutError:
            self._fell_silent(probe)
            return None
        except _Refused:
            return None
        figures: list[Figure] = []
        latency: float | None = None
        # As serving does it, then the other way: a link can be slow in one direction.
        order: tuple[tuple[Operation, Probe, Probe], ...] = (
            ("read", decode, prefill),
            ("write", prefill, decode),
            ("read", prefill, decode),
            ("write", decode, prefill),
        )
        try:
            for operation, initiator, target in order:
                figure, took = await self._measure(operation, initiator, target)
                figures.append(figure)
                latency = latency if latency is not None else took
        except _Refused as refused:
            broken, culprit = refused.broken, initiator
            if broken.cause in LINK and (death := await self._died(target)) is not None:
                broken, culprit = death, target
            for probe in (prefill, decode):
                await self._replace(probe)
            if broken.cause not in LINK:
                self._broken.setdefault(culprit.node, broken)
                return None
            return Pair(prefill=prefill, decode=decode, figures=tuple(figures), broken=broken)
        return Pair(prefill=prefill, decode=decode, figures=tuple(figures), latency_us=latency)

    async def _died(self, probe: Probe) -> Broken | None:
        """Why a probe no longer answers; None where it does."""
        try:
            await self._ask(probe, {"ask": "alive"}, 0.0)
        except _Refused as refused:
            return refused.broken
        return None

    async def _measure(self, operation: Operation, initiator: Probe, target: Probe) -> tuple[Figure, float]:
        memory = await self._memory(target)
        told = await self._ask(
            initiator,
            {
                "ask": "measure",
                "operation": operation,
                "peer": target.name,
                "memory": to_json(memory),
                "seconds": OPERATION,
            },
            2 * OPERATION,
        )
        size = int(told["size"])
        if operation == "write":
            check = await self._ask(target, {"ask": "came", "peer": initiator.name, "size": size}, OPERATION)
            if not check["came"]:
                raise _Refused(
                    Broken(
                        cause="data", message=f"a write of {size} bytes was over, and other bytes had come"
                    )
                )
        source = target if operation == "read" else initiator
        figure = Figure(
            operation=operation,
            source=source.node,
            initiator=initiator.node,
            gbs=round(float(told["gbs"]), 6),
            size=size,
            transport=told["transport"],
            devices=tuple(told["devices"]),
            link_gbs=told["link_gbs"],
        )
        return figure, round(float(told["latency_us"]), 1)

    async def _ask(self, probe: Probe, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises _Refused for everything but an answer."""
        node = self._nodes[probe.rank]
        if node.gone is not None:
            raise _Refused(node.gone)
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        node.answers[number] = future
        message = {"id": number, "probe": probe.name, "command": command, "seconds": seconds}
        try:
            async with asyncio.timeout(seconds + _ANSWER):
                await node.channel.send(message)
                return await future
        except _Refused:
            raise
        except Failed as error:
            broken = Broken(
                cause="silent",
                message=f"{probe.node} gave no answer within {seconds + _ANSWER:g} s",
                hint=f"does it still reach {self._roster.ranks[0].node} over TCP?",
            )
            # Nobody else should wait for it as long.
            node.fail(broken)
            raise _Refused(broken) from error
        finally:
            node.answers.pop(number, None)

    async def _replace(self, probe: Probe) -> None:
        """A new process: what UCX still tries in the old one would go on beside the next pair."""
        node = self._nodes[probe.rank]
        if node.gone is not None:
            return
        node.expect(probe.name)
        try:
            await node.channel.send({"replace": probe.name})
        except OSError as error:
            broken = Broken(cause="silent", message=f"{probe.node} is gone: {error}")
            _refuse(node.memory[probe.name], broken)
