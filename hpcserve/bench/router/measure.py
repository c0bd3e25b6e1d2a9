"""One router, started, loaded in every way, and ended."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ...errors import RunError
from .. import processes
from . import cost
from .peers import KEY, MODEL, Peer, Place, free_port

_START = 60.0
_END = 10.0
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One kind of load: `requests` over `connections`, `words` per prompt, `tokens` per answer."""

    name: str
    connections: int
    requests: int
    words: int
    tokens: int


LOADS = (
    Load(name="chunk", connections=64, requests=128, words=100, tokens=64),
    Load(name="stream", connections=64, requests=64, words=100, tokens=512),
    Load(name="short", connections=32, requests=1600, words=100, tokens=1),
    Load(name="long", connections=4, requests=600, words=12_000, tokens=1),
    Load(name="ttft_1", connections=1, requests=300, words=100, tokens=1),
    Load(name="ttft_64", connections=64, requests=1280, words=100, tokens=1),
)
_WARM = Load(name="warm", connections=64, requests=256, words=100, tokens=4)


class Generator:
    """The load generator's process."""

    def __init__(self) -> None:
        self._process = _python("hpcserve.bench.router.load")
        self._seed = 0

    def run(self, ports: Sequence[int], load: Load) -> Json:
        """Connections are spread over `ports`."""
        self._seed += 1
        job = {
            "ports": list(ports), "connections": load.connections, "requests": load.requests,
            "words": load.words, "tokens": load.tokens, "seed": self._seed, "key": KEY, "model": MODEL,
        }  # fmt: skip
        stdin, stdout = _pipes(self._process)
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        answer: Json = json.loads(stdout.readline())
        return answer

    def close(self) -> None:
        _end(self._process)


@contextmanager
def engines(count: int, gap: float) -> Iterator[tuple[int, ...]]:
    """Mock engines, as ports."""
    started = [_python("hpcserve.bench.router.engine", "--gap", str(gap)) for _ in range(count)]
    try:
        yield tuple(int(_pipes(process)[1].readline()) for process in started)
    finally:
        for process in started:
            _end(process)


def measure(
    peer: Peer,
    executable: str,
    peers: Path | None,
    ports: Sequence[int],
    generator: Generator,
    log: Path,
) -> Json:
    """CPU seconds per event and request, times to first token, memory and errors. Raises RunError."""
    with tempfile.TemporaryDirectory(prefix="hpcserve-bench-") as directory, log.open("ab") as err:
        place = Place(
            executable=executable,
            directory=Path(directory),
            port=free_port(),
            engines=tuple(ports),
            peers=peers,
        )
        command = peer.command(place)
        beside = [
            processes.start(argv, directory=place.directory, log=err, env=command.env)
            for argv in command.beside
        ]
        process = processes.start(command.argv, directory=place.directory, log=err, env=command.env)
        try:
            _until_up(peer, process, place.port, log)
            generator.run([place.port], _WARM)
            found: Json = {"errors": 0, "closed": 0}
            for load in LOADS:
                # What a router learns from the first requests of a new kind is its own, and not their price.
                generator.run([place.port], replace(load, requests=load.requests // 4))
                before = cost.cpu_seconds(process.pid)
                result = generator.run([place.port], load)
                spent = cost.cpu_seconds(process.pid) - before
                found["errors"] += result["errors"]
                found["closed"] += result["closed"]
                _note(found, load, result, spent)
            sizes = cost.resident(process.pid)
            return found | {"rss": sizes[0], "rss_all": sum(sizes), "processes": len(sizes)}
        finally:
            processes.end(process, *beside)


def direct(ports: Sequence[int], generator: Generator) -> Json:
    """Times to first token without a router."""
    found: Json = {}
    generator.run(ports, _WARM)
    for load in LOADS:
        if load.name.startswith("ttft"):
            _note(found, load, generator.run(ports, load), 0.0)
    return found


def _note(found: Json, load: Load, result: Json, spent: float) -> None:
    ttft = result["ttft"]
    if load.name.startswith("ttft"):
        found[f"{load.name}_p50"] = ttft[len(ttft) // 2] if ttft else None
        found[f"{load.name}_p99"] = ttft[len(ttft) * 99 // 100] if ttft else None
    elif load.name in ("chunk", "stream"):
        # The chunk that opens a chat comes with the first token.
        found[load.name] = spent / max(1, result["answers"] * load.tokens)
    else:
        found[load.name] = spent / max(1, result["answers"])


def _until_up(peer: Peer, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START
    body = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "up?"}], "max_tokens": 1, "stream": True}
    )
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
        try:
            headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            if answer.status == 200 and b"[DONE]" in answer.read():
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RunError(f"{peer.name} did not come up in {_START:g} s", hint=f"its output is in {log}")


def _python(module: str, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=processes.environment(),
    )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    stdin, stdout = _pipes(process)
    stdin.close()
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stdout.close()
