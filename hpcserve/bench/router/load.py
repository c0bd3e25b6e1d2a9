"""`python -m hpcserve.bench.router.load`: the load generator. Reads jobs as JSON lines, prints results."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from functools import partial
from typing import Any, cast

import httptools
import uvloop

_PATIENCE = 120.0
_DONE = b"data: [DONE]"


class Client(asyncio.Protocol):
    """One connection that sends requests one after the other and counts events of the answers."""

    def __init__(self, requests: deque[bytes], done: asyncio.Future[None], result: Result) -> None:
        self._requests = requests
        self._done = done
        self._result = result
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._sent = 0.0
        self._first = 0.0
        self._tail = b""
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._result.errors += 1
            self._done.set_result(None)

    def _next(self) -> None:
        assert self._transport is not None
        if not self._requests:
            self._done.set_result(None)
            self._transport.close()
            return
        self._parser = httptools.HttpResponseParser(self)
        self._first = 0.0
        self._tail = b""
        self._ended = False
        self._sent = time.perf_counter()
        self._transport.write(self._requests.popleft())

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._result.errors += 1
            assert self._transport is not None
            self._transport.abort()

    def on_body(self, data: bytes) -> None:
        if not self._first:
            self._first = time.perf_counter() - self._sent
        self._result.events += data.count(b"data: {")
        # Routers may cut the stream anywhere.
        tail = self._tail + data
        self._ended = self._ended or _DONE in tail
        self._tail = tail[-len(_DONE) :]

    def on_message_complete(self) -> None:
        parser, self._parser = self._parser, None
        if parser.get_status_code() != 200 or not self._ended:
            self._result.errors += 1
        else:
            self._result.answers += 1
            self._result.ttft.append(self._first)
        if parser.should_keep_alive():
            self._next()
        else:
            # Counted as an answer, but a benchmark of kept connections should know.
            self._result.closed += 1
            self._done.set_result(None)


class Result:
    def __init__(self) -> None:
        self.answers = 0
        self.events = 0
        self.errors = 0
        self.closed = 0
        self.ttft: list[float] = []


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """`ports`, `connections`, `requests` (all of them), `words` per prompt, `tokens` per answer, `seed`."""
    body = _bodies(job)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{job['ports'][0]}\r\nuser-agent: bench\r\n"
        f"accept: */*\r\nauthorization: Bearer {job['key']}\r\ncontent-type: application/json\r\n"
    ).encode()
    requests = deque(head + b"content-length: %d\r\n\r\n%b" % (len(one), one) for one in body)
    result = Result()
    loop = asyncio.get_running_loop()
    waiting = []
    began = time.perf_counter()
    ports = job["ports"]
    for number in range(job["connections"]):
        done: asyncio.Future[None] = loop.create_future()
        waiting.append(done)
        make = partial(Client, requests, done, result)
        await loop.create_connection(make, "127.0.0.1", ports[number % len(ports)])
    _, late = await asyncio.wait(waiting, timeout=_PATIENCE)
    result.errors += len(late) + len(requests)
    return {
        "answers": result.answers, "events": result.events, "errors": result.errors, "closed": result.closed,
        "seconds": time.perf_counter() - began, "ttft": sorted(result.ttft),
    }  # fmt: skip


def _bodies(job: dict[str, Any]) -> list[bytes]:
    """Prompts that differ from their first word, as those of strangers do."""
    filler = " ".join(f"word{number % 10}" for number in range(job["words"] - 2))
    bodies = []
    for number in range(job["requests"]):
        content = f"request {job['seed']}-{number} {filler}"
        bodies.append(
            json.dumps(
                {
                    "model": job["model"],
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": job["tokens"],
                    "stream": True,
                }
            ).encode()
        )
    return bodies


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(uvloop.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
