"""A relay as the supervisor sees it: a process, the line to it, and what it last said."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .control import Control, Json, Poll

_LAST_WORDS = 1.0

_decoder: msgspec.json.Decoder[Json] = msgspec.json.Decoder(Json)


class Child:
    """One relay, and its successors: `start()` may be called again after `wait()`."""

    def __init__(
        self,
        number: int,
        *,
        config: Path,
        sockets: Sequence[socket.socket],
        board_fd: int | None,
        on_message: Callable[[Child, Json], None],
    ) -> None:
        self.number = number
        self.sockets = list(sockets)
        self.ready = False
        """It serves."""
        self.drained = False
        """It has nothing left to do."""
        self.served = False
        """It, or one before it, has served."""
        self.stats: Json = {}
        self.unanswered = 0
        """Polls since it last answered one."""
        self._config = config
        self._board_fd = board_fd
        self._on_message = on_message
        self._process: asyncio.subprocess.Process | None = None
        self._control: Control[Json] | None = None
        self._polled: asyncio.Future[None] | None = None

    async def start(self, messages: Sequence[Any]) -> None:
        """Start a process and tell it `messages` first. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [sock.fileno() for sock in self.sockets]
            argv = [
                "--relay", str(self.number), "--config", str(self._config),
                "--control-fd", str(theirs.fileno()), "--sockets", ",".join(map(str, fds)),
            ]  # fmt: skip
            if self._board_fd is not None:
                argv += ["--board-fd", str(self._board_fd)]
                fds.append(self._board_fd)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hpcserve.router", *argv,
                stdin=asyncio.subprocess.DEVNULL, pass_fds=[*fds, theirs.fileno()],
            )  # fmt: skip
        self.drained = False
        self._control = Control(self._hear, lambda: None, _decoder, other=f"relay {self.number}")
        await self._control.open(ours.detach())
        for message in messages:
            self._control.insist(message)

    def _hear(self, message: Json) -> None:
        match message.get("type"):
            case "ready":
                self.ready = self.served = True
            case "drained":
                self.drained = True
            case "stats":
                self.stats = {key: value for key, value in message.items() if key != "type"}
                self.unanswered = 0
                if self._polled is not None and not self._polled.done():
                    self._polled.set_result(None)
        self._on_message(self, message)

    def tell(self, message: Any) -> None:
        if self._control is not None:
            self._control.insist(message)

    @property
    def unread(self) -> int:
        """Bytes told that it has not taken."""
        return 0 if self._control is None else self._control.unread

    async def poll(self) -> None:
        """Returns when `stats` are newer than this call, or the relay has died."""
        if self._control is None:
            return
        self._polled = asyncio.get_running_loop().create_future()
        self.unanswered += 1
        self._control.insist(Poll())
        await self._polled

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        assert self._process is not None and self._control is not None
        status = await self._process.wait()
        control, self._control = self._control, None
        # Its last words: what it counted since the last time.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(control.ended(), _LAST_WORDS)
        await control.close()
        self.ready = False
        self.drained = True
        self.unanswered = 0
        if self._polled is not None and not self._polled.done():
            self._polled.set_result(None)
        return status

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def close_sockets(self) -> None:
        """Its part of the port is served by the others, or by nobody."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
