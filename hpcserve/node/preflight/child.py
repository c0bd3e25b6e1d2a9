"""A probe's process as its node sees it: started, asked, replaced, ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

import msgspec

from ..console import say
from ..process import signal_group
from .command import Command
from .records import Broken, Memory, Probe

MARGIN = 5.0
"""Seconds beyond a command's own deadline until a silent process counts as hanging."""
_LINE = 1 << 20


class ProbeFailed(Exception):
    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.message)
        self.broken = broken


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for what is no answer."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


class Child:
    """One process at a time. Not for two commands at once."""

    def __init__(self, probe: Probe, command: Command, device: str) -> None:
        self.probe = probe
        self._command = command
        self._device = device
        self._process: Process | None = None

    async def start(self, seconds: float) -> Memory:
        """A new process; the one before is killed. Raises ProbeFailed when it can't begin in `seconds`."""
        await self.kill()
        # A container's runtime is the parent of what runs in it, and is not ended alone.
        contained = self._command.contained
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command.argv,
                self.probe.name,
                self._device,
                "0" if contained else str(os.getpid()),
                env=self._command.environ,
                start_new_session=contained,
                stdin=PIPE,
                stdout=PIPE,
                limit=_LINE,
            )
        except OSError as error:
            told = f"the preflight's process on {self._node} can't be started: {error}"
            raise ProbeFailed(Broken(cause="died", message=told)) from error
        answer = await self._answer(seconds, f"did not have NIXL ready within {seconds:g} s")
        return msgspec.convert(answer["ready"], Memory)

    async def ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer. Raises ProbeFailed for one that is none; the process may be unusable then."""
        process = self._process
        if process is None or process.stdin is None:
            raise ProbeFailed(
                Broken(cause="died", message=f"the preflight's process on {self._node} is gone")
            )
        process.stdin.write((json.dumps(command) + "\n").encode())
        with suppress(OSError):  # it died: the missing answer tells
            await process.stdin.drain()
        return await self._answer(seconds + MARGIN, f"hung in NIXL for {seconds + MARGIN:g} s")

    async def _answer(self, seconds: float, late: str) -> dict[str, Any]:
        # Whoever kills it meanwhile forgets it.
        process, answer = self._process, None
        assert process is not None and process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                while (line := await process.stdout.readline()) and (answer := _parsed(line)) is None:
                    # A container's runtime, or what its image starts with, may speak there too.
                    say(line.decode(errors="replace").rstrip())
                if not line:
                    await process.wait()
        except TimeoutError:
            raise ProbeFailed(
                Broken(
                    cause="timeout",
                    message=f"the preflight's process on {self._node} {late}",
                    hint="is the file system with the Python environment slow there, or a device in trouble?",
                )
            ) from None
        if answer is None:
            raise ProbeFailed(self._death(process))
        if "broken" in answer:
            raise ProbeFailed(msgspec.convert(answer["broken"], Broken))
        return answer

    def _death(self, process: Process) -> Broken:
        status = process.returncode
        how = f"with status {status}"
        if status is not None and status < 0:
            how = f"by {signal.Signals(-status).name}"
        return Broken(
            cause="died",
            message=f"the preflight's process on {self._node} ended {how}",
            hint=f"logs/preflight-{self.probe.rank}.log has its last lines",
        )

    @property
    def _node(self) -> str:
        return self.probe.label

    async def kill(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._command.contained:
            signal_group(process.pid, signal.SIGKILL)
        else:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()
