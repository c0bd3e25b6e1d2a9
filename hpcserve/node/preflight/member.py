"""Every node's part: it starts its probes, and does with them what the coordinator on rank 0 says.

member -> coordinator   {"rank", "node", "probes": [Probe]}
coordinator -> member   {"welcome": true}
member -> coordinator   {"probe", "ready": Memory} or {"probe", "broken": Broken}   once, and after `replace`
                        {"id", "answer"} or {"id", "broken"}                        one for each command
coordinator -> member   {"id", "probe", "command", "seconds"}                       for the probe's process
                        {"replace": probe}                                          a new process
                        {"over": true}
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import RendezvousError
from ...rundir.atomic import read_json
from ...rundir.layout import RunDir
from ..console import say
from ..discovery.fabric import HcaPort
from ..discovery.facts import Roster
from ..frames import HELLO_TIMEOUT, Channel, Failed, WrongKey, connect
from ..inputs import Inputs
from ..ports import PortRange, ephemeral_range
from .child import Child, ProbeFailed
from .command import probe_command
from .ending import is_over
from .links import link_gbs
from .probes import Placed, node_name
from .records import Probe, to_json

START = 180.0
"""Seconds for a process to import NIXL and torch; a shared file system that is cold takes minutes.

Rank 0 may be late by as much, for the same reason.
"""


class NoCoordinator(RendezvousError):
    """Rank 0 of the preflight can't be reached."""


def port_range(inputs: Inputs) -> PortRange:
    """The same order of ports on every rank, so that the coordinator's can be guessed."""
    ports = inputs.plan.site.ports
    seed = f"preflight {inputs.run.path} {inputs.attempt}"
    return PortRange(low=ports.low, high=ports.high, seed=seed, ephemeral=ephemeral_range())


def published(run: RunDir) -> Path:
    """Where the coordinator says how it can be reached. Gone at each start of the job."""
    return run.path / "rendezvous" / "preflight.json"


class Member:
    """Use as a context manager: no process is left."""

    def __init__(self, inputs: Inputs, roster: Roster, rank: int, placed: Sequence[Placed]) -> None:
        self._inputs = inputs
        self._roster = roster
        self._facts = roster.ranks[rank]
        self._rank = rank
        self._children = {
            item.probe.name: Child(item.probe, probe_command(inputs, item), item.device) for item in placed
        }
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Member:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in self._children.values():
            await child.kill()

    async def run(self) -> None:
        """Until the coordinator says that it is over. Raises NoCoordinator when it is not there in time."""
        starting = {name: asyncio.create_task(child.start(START)) for name, child in self._children.items()}
        try:
            channel = await self._join()
        except BaseException:
            for task in starting.values():
                task.cancel()
            await asyncio.gather(*starting.values(), return_exceptions=True)
            raise
        try:
            if channel is None:
                say(f"preflight: rank {self._rank} came when it was over")
                return
            for name, started in starting.items():
                self._do(self._tell_ready(channel, name, started))
            while True:
                message = await channel.receive()
                if message.get("over"):
                    return
                if "replace" in message:
                    name = message["replace"]
                    started = asyncio.create_task(self._children[name].start(START))
                    self._do(self._tell_ready(channel, name, started))
                else:
                    self._do(self._obey(channel, message))
        except Failed as error:
            head = self._roster.ranks[0].node
            raise NoCoordinator(
                f"the preflight's coordinator on {head} is gone: {error or 'it hung up'}",
                hint="logs/preflight-0.log says why",
            ) from error
        finally:
            for task in starting.values():
                task.cancel()
            if channel is not None:
                await channel.close()

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_ready(self, channel: Channel, name: str, started: asyncio.Task[Any]) -> None:
        try:
            message = {"probe": name, "ready": to_json(await started)}
        except ProbeFailed as failed:
            say(f"preflight: {failed.broken.message}")
            message = {"probe": name, "broken": to_json(failed.broken)}
        with suppress(OSError):  # the coordinator is gone: receiving notices
            await channel.send(message)

    async def _obey(self, channel: Channel, message: dict[str, Any]) -> None:
        child = self._children[message["probe"]]
        answer: dict[str, Any]
        try:
            told = await child.ask(message["command"], float(message["seconds"]))
            answer = {"id": message["id"], "answer": self._with_link(child.probe, told)}
        except ProbeFailed as failed:
            answer = {"id": message["id"], "broken": to_json(failed.broken)}
        with suppress(OSError):
            await channel.send(answer)

    def _with_link(self, probe: Probe, told: dict[str, Any]) -> dict[str, Any]:
        if "gbs" not in told:
            return told
        hcas: tuple[HcaPort, ...] = self._facts.hcas
        used = told["devices"]
        if used:
            return {**told, "link_gbs": link_gbs(used, hcas)}
        # UCX did not say which of these it uses: then it is at least one of them.
        rates = [rate for name in probe.expected if (rate := link_gbs([name], hcas)) is not None]
        return {**told, "devices": list(probe.expected), "link_gbs": max(rates, default=None)}

    async def _join(self) -> Channel | None:
        """None when it is over already."""
        loop = asyncio.get_running_loop()
        end, delay = loop.time() + START, 0.05
        why = "nobody answers"
        while loop.time() < end:
            if is_over(self._inputs.run, self._inputs.attempt):
                return None
            for address, port in self._candidates():
                try:
                    channel = await self._introduce(address, port, end - loop.time())
                    if channel is not None:
                        return channel
                except WrongKey:
                    why = "it has another job key"
                except Failed:
                    continue
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 1.0)
        head = self._roster.ranks[0]
        raise NoCoordinator(
            f"the preflight's coordinator on {head.node} ({head.address}) can't be reached: {why}",
            hint="do these nodes reach each other over TCP, and see the same run directory?",
        )

    async def _introduce(self, address: str, port: int, seconds: float) -> Channel | None:
        """A channel to a coordinator that is ours. Raises one of `Failed`, or WrongKey."""
        attempt, key = self._inputs.attempt, self._inputs.job_key.encode()
        channel = await connect(address, port, key=key, attempt=attempt, seconds=max(0.1, min(5.0, seconds)))
        if channel is None:
            return None
        try:
            probes = [to_json(child.probe) for child in self._children.values()]
            await channel.send(
                {"rank": self._rank, "node": node_name(self._roster, self._rank), "probes": probes}
            )
            async with asyncio.timeout(HELLO_TIMEOUT):
                await channel.receive()
        except BaseException:
            await channel.close()
            raise
        return channel

    def _candidates(self) -> list[tuple[str, int]]:
        """Where the coordinator says it is, else where it most likely is: a file may be late on NFS."""
        try:
            entry = read_json(published(self._inputs.run))
            if entry.get("attempt") == self._inputs.attempt:
                return [(str(entry["address"]), int(entry["port"]))]
        except FileNotFoundError:
            pass
        guess = next(iter(port_range(self._inputs).candidates()), None)
        return [] if guess is None else [(self._roster.ranks[0].address, guess)]
