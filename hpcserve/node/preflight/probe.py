"""The program with the NIXL agent: `python -m hpcserve.node.preflight.probe NAME DEVICE PARENT`.

PARENT is the process it must not outlive, 0 the one that started it, whatever that is. It may run in an image
without hpcserve: the standard library, torch and NIXL are all it needs.

NIXL and UCX live here and end with it. Started with the environment of a replica, it reads one JSON command a
line from stdin and writes one JSON answer a line to what was stdout: file 1 itself is where UCX prints its
tables. NIXL calls may block or crash; whoever started this program keeps the time and ends it.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from ..process import die_with_parent
from .buffers import Buffers, seed
from .records import Broken, Cause, Memory, Operation, to_json
from .transport import last_error, transports

_FIRST_SIZE = 64 << 10
_GROWTH = 4
_ENOUGH = 0.05
"""Seconds of transfers that give a sample."""
_LATENCIES = 5
"""Times a small read's latency that a transfer takes at least: or latency would be what is measured."""
_SAMPLES = 3
_SPENT = 0.5
"""Seconds after which no further sample is begun."""
_SMALL = 64
_READS = 20
_READ_SECONDS = 0.2
"""Most time for these reads, where each takes long."""


class Failed(Exception):
    def __init__(self, cause: Cause, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.broken = Broken(cause=cause, message=message, hint=hint)


class Agent:
    """One NIXL agent with its registered buffers."""

    def __init__(self, name: str, device: str) -> None:
        began = time.monotonic()
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise Failed(
                "import", f"NIXL can't be imported: {error}", "install `nixl` where the engines run"
            ) from error
        # Before the agent: UCX looks for GPUs in a CUDA context that exists.
        self._buffers = _buffers(name, device)
        try:
            # A process that takes another's place is somebody else to agents that knew the first one.
            unique = f"{name}-{secrets.token_hex(4)}"
            self._agent: Any = nixl_agent(unique, nixl_agent_config(backends=["UCX"]))
        except Exception as error:
            devices = os.environ.get("UCX_NET_DEVICES", "any device")
            raise Failed(
                "backend",
                f"NIXL could not start UCX on {devices}: {_words(error)}",
                "is that device up on this node, and are UCX_TLS and UCX_NET_DEVICES right?",
            ) from error
        # A backend that can't be loaded is left out without an error.
        if "UCX" not in self._agent.backends:
            raise Failed(
                "backend", "NIXL has no UCX backend here", "is NIXL_PLUGIN_DIR set to a place without it?"
            )
        buffers, kind = self._buffers, self._buffers.kind
        try:
            regions = [(at, buffers.size, buffers.device, "") for at in (buffers.source, buffers.sink)]
            self._agent.register_memory(regions, kind)
        except Exception as error:
            raise Failed(
                "memory",
                f"NIXL could not register {2 * buffers.size >> 20} MiB of {kind}: {_words(error)}",
                "is `ulimit -l` unlimited in jobs? For GPUs, is nvidia_peermem loaded?",
            ) from error
        self.memory = Memory(
            metadata=base64.b64encode(self._agent.get_agent_metadata()).decode(),
            source=buffers.source,
            sink=buffers.sink,
            size=buffers.size,
            kind=kind,
            device=buffers.device,
            seconds=round(time.monotonic() - began, 3),
        )

    def came(self, peer: str, size: int) -> bool:
        """Is what was written here the peer's pattern?"""
        return self._buffers.came(seed(peer), size)

    def measure(self, operation: Operation, memory: Memory, seconds: float) -> tuple[float, int, float]:
        """Rate in 10^9 bytes/s, size of the last transfer, and median latency of a small read in µs.

        Raises Failed when a transfer fails, or one alone is not over after `seconds`. Where all is slow, it
        ends with what it has then, and takes twice that at most.
        """
        end = time.monotonic() + seconds
        try:
            known = self._agent.add_remote_agent(base64.b64decode(memory.metadata))
            remote = known.decode() if isinstance(known, bytes) else str(known)
        except Exception as error:
            raise Failed("transfer", f"no connection: {_words(error)}") from error
        latency = self._latency(remote, memory, seconds)
        size = _FIRST_SIZE
        enough = max(_ENOUGH, _LATENCIES * latency)
        while True:
            with self._transfer(operation, remote, memory, size) as transfer:
                taken = transfer.run(seconds)
                if enough <= taken < end - time.monotonic():
                    # Slow, or only this once? Small transfers would never show what the link can do.
                    taken = min(taken, transfer.run(seconds))
                if taken < enough and size < memory.size and time.monotonic() < end:
                    size = min(size * _GROWTH, memory.size)
                    continue
                samples = [size / taken]
                spent = taken
                while len(samples) <= _SAMPLES and spent < _SPENT and time.monotonic() < end:
                    moved, taken = 0, 0.0
                    while taken < enough and time.monotonic() < end:
                        taken += transfer.run(seconds)
                        moved += size
                    if not moved:
                        break
                    samples.append(moved / taken)
                    spent += taken
            # What takes the cores or the link for a moment only ever makes it slower.
            return max(samples) / 1e9, size, latency * 1e6

    def _latency(self, remote: str, memory: Memory, seconds: float) -> float:
        with self._transfer("read", remote, memory, _SMALL) as transfer:
            transfer.run(seconds)  # connects
            taken: list[float] = []
            while not taken or (len(taken) < _READS and sum(taken) < _READ_SECONDS):
                taken.append(transfer.run(seconds))
            return median(taken)

    def _transfer(self, operation: Operation, remote: str, memory: Memory, size: int) -> _Transfer:
        buffers, agent = self._buffers, self._agent
        reads = operation == "read"
        own, theirs = (buffers.sink, memory.source) if reads else (buffers.source, memory.sink)
        local = agent.get_xfer_descs([(own, size, buffers.device)], buffers.kind)
        other = agent.get_xfer_descs([(theirs, size, memory.device)], memory.kind)
        try:
            handle = agent.initialize_xfer(operation.upper(), local, other, remote)
        except Exception as error:
            raise Failed("transfer", f"NIXL refused a {operation}: {_words(error)}") from error
        return _Transfer(agent, handle, f"{operation} of {_size(size)}")


class _Transfer:
    """A prepared request that can be run several times."""

    def __init__(self, agent: Any, handle: Any, what: str) -> None:
        self._agent = agent
        self._handle = handle
        self._what = what

    def __enter__(self) -> _Transfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of a request under way, NIXL would wait for the end: this process is ended instead.
        if kind is None:
            self._agent.release_xfer_handle(self._handle)

    def run(self, seconds: float) -> float:
        """Seconds it took. Raises Failed, also when it is not over after `seconds`."""
        began = time.perf_counter()
        try:
            state = self._agent.transfer(self._handle)
            while state == "PROC":
                if time.perf_counter() - began > seconds:
                    raise Failed("timeout", f"a {self._what} was not over after {seconds:g} s")
                if time.perf_counter() - began > 0.001:
                    # NIXL's own thread moves the bytes, and may have only this core.
                    time.sleep(0.0001)
                state = self._agent.check_xfer_state(self._handle)
        except Failed:
            raise
        except Exception as error:
            raise Failed("transfer", f"a {self._what} failed: {_words(error)}") from error
        if state != "DONE":
            raise Failed("transfer", f"a {self._what} failed: NIXL's state is {state}")
        return time.perf_counter() - began


def _buffers(name: str, device: str) -> Buffers:
    try:
        return Buffers(seed(name), device)
    except Exception as error:
        raise Failed("memory", f"no test buffers on {device}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _size(size: int) -> str:
    return f"{size} bytes" if size < 1024 else f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


class Console:
    """What UCX prints: file 1, which nobody reads but us."""

    def __init__(self) -> None:
        self._file = os.memfd_create("ucx")
        os.dup2(self._file, 1)

    def text(self) -> str:
        """All of it so far."""
        return os.pread(self._file, os.fstat(self._file).st_size, 0).decode(errors="replace")


def serve(agent: Agent, console: Console, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer commands until stdin ends."""
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(_answer(agent, console, command))
        except Failed as failed:
            answer({"broken": to_json(_explained(failed.broken, console))})


def _explained(broken: Broken, console: Console) -> Broken:
    """With what UCX printed about it last."""
    told = last_error(console.text())
    return replace(broken, message=f"{broken.message} ({told})") if told else broken


def _answer(agent: Agent, console: Console, command: dict[str, Any]) -> dict[str, Any]:
    if command["ask"] == "alive":
        return {"alive": True}
    peer = str(command["peer"])
    if command["ask"] == "came":
        return {"came": agent.came(peer, int(command["size"]))}
    operation: Operation = command["operation"]
    rate, size, latency = agent.measure(operation, Memory(**command["memory"]), command["seconds"])
    if operation == "read" and not agent.came(peer, size):
        raise Failed("data", f"a read of {_size(size)} was over, and other bytes had come")
    used = transports(console.text()).get(operation)
    return {
        "gbs": rate,
        "size": size,
        "latency_us": latency,
        "transport": used.text if used else None,
        "devices": list(used.devices) if used else None,
    }


def main(argv: list[str]) -> None:
    name, device, parent = argv
    die_with_parent(int(parent) or os.getppid())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    console = Console()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        agent = Agent(name, device)
    except Failed as failed:
        answer({"broken": to_json(_explained(failed.broken, console))})
    else:
        answer({"ready": to_json(agent.memory)})
        serve(agent, console, answer)
    sys.stderr.flush()
    # Without destructors: NIXL's crash when its peers are gone already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
