"""Time of one request in the router, without the kernel: `python -m tests.router.bench_request`.

Recorded bytes go through both connections of a request, whose transports do nothing; everything between is
the router's own. Each figure is the least and the median of many rounds, compiled and as pure Python; warm,
one request after the other, and cold: before each piece others had the processor's caches, as in a run.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import uvloop

from hpcserve.bench.router.engine import _chunks, _prefilled
from hpcserve.bench.router.load import _bodies
from hpcserve.http.compiled import PURE
from hpcserve.http.connection import Connection
from hpcserve.http.limits import Limits
from hpcserve.http.server import Server
from hpcserve.http.upstream import UpstreamConnection
from hpcserve.router.app import Router
from hpcserve.router.config import RouterConfig, WorkerSpec
from hpcserve.router.control import Table

ROUNDS = 10
KINDS = {"short": (100, False, 200), "short, two legs": (100, True, 200), "12,000 words": (12_000, False, 40)}
"""Words of the prompt, two legs, requests in a round."""
WAYS = {"pure Python": "1", "compiled": "0"}
OTHERS, ELSEWHERE = bytearray(1 << 20), bytes(1 << 20)
"""More than what one core has of caches."""
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\nuser-agent: bench\r\naccept: */*\r\n"
    b"authorization: Bearer sk-bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Transport:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def writelines(self, pieces: Any) -> None:
        self.sent += pieces

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 5) if name == "peername" else None

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: None


def answer(size: int) -> bytes:
    """What the mock engine of `hpcserve bench router` answers: one token, all in one piece."""
    tokens = max(1, size // 6)
    first, _, last = _chunks(True, tokens, sglang=False)
    usage = b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":1}' % (tokens, tokens + 1)
    tail = b'data: {"id":"cmpl-0","object":"x","created":1,"model":"mock","choices":[],' + usage + b"}\n\n"
    body = first + last + tail + b"data: [DONE]\n\n"
    head = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\n" + head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def timed(take: Callable[[bytes], None], data: bytes, cold: bool) -> int:
    """Nanoseconds for taking `data`."""
    if cold:
        OTHERS[:] = ELSEWHERE
    began = time.perf_counter_ns()
    take(data)
    return time.perf_counter_ns() - began


async def run(kind: str, *, cold: bool) -> list[float]:
    """Microseconds for each request, by round."""
    words, two_legs, count = KINDS[kind]
    roles = ("prefill", "decode") if two_legs else ("aggregated", "aggregated")
    specs = [
        WorkerSpec(name=f"{role}-{number}", role=role, url=f"http://127.0.0.1:{9000 + number}", slot=number)  # type: ignore[arg-type]
        for number, role in enumerate(roles)
    ]
    # Policy kv would compute such prompts on the decode worker, which is one leg.
    policy = "round_robin" if two_legs else "kv"
    config = RouterConfig(served_name="mock", engine="vllm", api_key="sk-bench", policy=policy)
    router = Router(config, on_suspect=print)
    router.pool._idle_timeout = 1e9
    router.update(Table(state="ready", workers=tuple(specs)))
    server = Server(
        router.handle, limits=Limits(), cancel_on_disconnect=True, quick=router.fast_path.quick,
        express=router.fast_path,
    )  # fmt: skip
    client, connection = Transport(), Connection(server)
    connection.connection_made(client)  # type: ignore[arg-type]
    engines = []
    for number in range(2):
        engine, upstream = Transport(), UpstreamConnection(router.pool, ("127.0.0.1", 9000 + number))
        upstream.connection_made(engine)  # type: ignore[arg-type]
        router.pool.put(upstream, ("127.0.0.1", 9000 + number))
        engines.append((engine, upstream))
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)
    figures = []
    for seed in range(ROUNDS):
        bodies = _bodies({"words": words, "requests": count, "seed": seed, "model": "mock", "tokens": 1})
        requests = [HEAD % len(body) + body for body in bodies]
        whole = answer(len(bodies[0]) + 60)
        leg = _prefilled(max(1, len(bodies[0]) // 6))
        leg = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            len(leg),
            leg,
        )
        spent = 0
        for request in requests:
            spent += timed(connection.data_received, request, cold)
            for number, (engine, upstream) in enumerate(engines):
                if engine.sent:
                    engine.sent.clear()
                    spent += timed(upstream.data_received, leg if two_legs and number == 0 else whole, cold)
            assert client.sent[-1].endswith(b"0\r\n\r\n"), client.sent
            client.sent.clear()
        figures.append(spent / count / 1000)
        await asyncio.sleep(0)
    transferred = router.metrics.kv_legs.child(("result", "transferred")).value
    assert transferred == (ROUNDS * count if two_legs else 0), transferred
    router.fast_path.close()
    await router.runner.close()
    return figures


def main() -> None:
    if len(sys.argv) > 1:
        figures = uvloop.run(run(sys.argv[1], cold=sys.argv[2] == "cold"))
        print(f"least {min(figures):7.1f} us, median {statistics.median(figures):7.1f} us")
        return
    for kind in KINDS:
        for caches, (name, pure) in itertools.product(("warm", "cold"), WAYS.items()):
            command = [sys.executable, "-m", "tests.router.bench_request", kind, caches]
            done = subprocess.run(
                command, env=os.environ | {PURE: pure}, capture_output=True, text=True, check=True
            )
            print(f"{kind:16} {name:12} {caches} {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
