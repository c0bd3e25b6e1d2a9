"""`python -m tests.router.soak --requests 200000`: a router under mixed load while engines come and go.

A real router process, real fake engines. At the end: memory flat, all counters zero, no connection left, and
one valid outcome for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcserve.http.client import Pool, UpstreamError

from .live import DEADLINE, LiveRouter, worker

log = logging.getLogger(__name__)

LANES = 16
SOAK_GROWTH = 8 << 20
"""Bytes that the second half of a run of at least 20,000 requests may add: caches are full by then."""
KEY = "sk-soak"
AGGREGATED = ("aggregated-0", "aggregated-1", "aggregated-2")
SPLIT = ("prefill-0", "prefill-1", "decode-0", "decode-1")
_OUTCOME = 60.0
_ASKED_AGAIN = 10.0
_TROUBLE = frozenset({429, 500, 502, 503, 504})
"""What a good request may be told while its engines die."""
_COUNTS = ("in_flight", "queue", "waiting", "running", "tokens", "body_bytes")
"""Gauges with one of these in their names say what goes on right now."""
_WORDS = (
    "soak",
    "the",
    "router",
    "in",
    "words",
    "and",
    "let",
    "it",
    "run",
    "for",
    "longer",
    "than",
    "anyone",
)


class Engine:
    """A fake engine that can be killed and started again, each time on another port."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.generation = 0
        self.url = ""
        self._folder = folder

    async def start(self) -> None:
        self.generation += 1
        log = self._folder / f"{self.name}.{self.generation}.log"
        role = self.name.partition("-")[0]
        flags = ["--role", role, "--itl-ms", "2", "--prefill-tokens-per-second", "2000000"]
        if role != "aggregated":
            flags += ["--side-channel-port", "0"]
        argv = [sys.executable, "-m", "hpcserve.engines.fake_server", "--model", "toy", "--port", "0", *flags]
        with log.open("wb") as output:
            environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(argv, stdout=output, stderr=output, env=environ)  # noqa: ASYNC220
        async with asyncio.timeout(DEADLINE):
            while True:
                text = log.read_text()
                found = re.search(r"Starting vLLM server on (http://\S+)", text)
                if found and "Application startup complete." in text:
                    self.url = found[1]
                    return
                assert self.process.poll() is None, text
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)

    @property
    def entry(self) -> dict[str, object]:
        return worker(self.name, self.url, self.generation)


@dataclass(slots=True)
class Report:
    """What a soak found."""

    requests: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    churn: collections.Counter[str] = field(default_factory=collections.Counter)
    memory: list[int] = field(default_factory=list)
    files: tuple[int, int] = (0, 0)
    """Open files of the router before and after."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Soak:
    """One run."""

    def __init__(self, live: LiveRouter, folder: Path, requests: int, seed: int) -> None:
        self._live = live
        self._requests = requests
        self._random = random.Random(seed)
        self._engines = {name: Engine(name, folder) for name in (*AGGREGATED, *SPLIT)}
        self._in_table = list(AGGREGATED)
        self._pool = Pool()
        self._done = asyncio.Event()
        self._every = max(150, min(2000, requests // 40))
        """Requests from one trouble to the next."""
        self._trouble = self._every
        """The request at which the next one comes."""
        self.report = Report()

    async def run(self) -> Report:
        began = time.monotonic()
        try:
            await asyncio.gather(*(engine.start() for engine in self._engines.values()))
            await self._live.table(self._entries())
            before = self._live.files()
            await self._load()
            await self._settle(before)
        finally:
            await self._pool.close()
            for engine in self._engines.values():
                engine.kill()
        self.report.seconds = time.monotonic() - began
        return self.report

    def _entries(self) -> list[dict[str, object]]:
        return [self._engines[name].entry for name in self._in_table]

    async def _load(self) -> None:
        numbers = iter(range(self._requests))
        async with asyncio.TaskGroup() as group:
            churn = group.create_task(self._churn())
            lanes = [group.create_task(self._lane(numbers)) for _ in range(LANES)]
            await asyncio.wait(lanes)
            self._done.set()
            await churn

    async def _settle(self, files: int) -> None:
        """Everything that was opened or counted up must go back to where it began."""
        failures = self.report.failures
        await self._live.table(self._entries())
        await self._live.idle()
        failures += [f"a gauge is not back at zero: {line}" for line in await self._gauges()]
        for engine in self._engines.values():
            await self._idle_engine(engine)
        await self._pool.close()
        for engine in self._engines.values():
            engine.kill()
        try:
            await self._live.until(lambda: self._live.files() <= files, "files to be closed", 15.0)
        except AssertionError:
            failures.append(f"{self._live.files()} files are open, {files} were before the first request")
        self.report.files = (files, self._live.files())
        failures += self._live.complaints
        memory = self.report.memory
        if self._requests >= 20_000 and memory[-1] > memory[len(memory) // 2] + SOAK_GROWTH:
            failures.append(f"memory grew in the second half: {[size >> 20 for size in memory]} MiB")

    async def _idle_engine(self, engine: Engine) -> None:
        async with asyncio.timeout(DEADLINE):
            while True:
                async with await self._pool.request("GET", engine.url + "/metrics") as response:
                    text = (await response.read(1 << 24)).decode()
                found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE)
                assert found, "the engine does not say how many requests it runs"
                if not any(map(float, found)):
                    return
                await asyncio.sleep(0.1)

    async def _gauges(self) -> list[str]:
        """Gauges that are not zero, after the time it may take to ask all engines once more."""
        url = f"http://127.0.0.1:{self._live.port}/metrics"
        last = time.monotonic() + _ASKED_AGAIN
        while True:
            async with _Request(self._pool, "GET", url, b"", KEY) as response:
                busy = _busy((await response.read(1 << 24)).decode())
            if not busy or time.monotonic() > last:
                return busy
            await asyncio.sleep(0.2)

    # Load

    async def _lane(self, numbers: Iterator[int]) -> None:
        every = max(1, self._requests // 40)
        for number in numbers:
            await self._behind()
            kind, target, body, key = self._choose(number)
            try:
                async with asyncio.timeout(_OUTCOME):
                    outcome = await self._one(kind, target, body, key)
            except TimeoutError:
                outcome = f"failed: {kind} has no outcome within {_OUTCOME:g} s"
            except UpstreamError as error:
                outcome = f"failed: {kind} broke off: {error}"
            if outcome.startswith("failed"):
                self.report.failures.append(f"request {number}: {outcome}")
                outcome = "failed"
            self.report.outcomes[f"{kind}: {outcome}"] += 1
            self.report.requests += 1
            if self.report.requests % every == 0:
                self.report.memory.append(self._live.memory())
                log.info("%d requests, %d MiB", self.report.requests, self.report.memory[-1] >> 20)

    async def _behind(self) -> None:
        """Where engines take long to start again, the load must not be over by then."""
        while self.report.requests >= self._trouble + self._every:  # noqa: ASYNC110 - the churn only counts
            await asyncio.sleep(0.02)

    def _choose(self, number: int) -> tuple[str, str, bytes, str]:
        draw = self._random
        roll = draw.random()
        words = " ".join(draw.choices(_WORDS, k=draw.randint(3, 60)))
        body: dict[str, object] = {"model": "toy", "max_tokens": draw.randint(1, 4), "temperature": 0}
        target = "/v1/completions"
        if draw.random() < 0.5:
            target = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": f"{number} {words}"}]
        else:
            body["prompt"] = f"{number} {words}"
        if roll < 0.45:
            kind = "short"
        elif roll < 0.75:
            kind = "stream"
            body |= {"stream": True, "max_tokens": draw.randint(2, 12)}
        elif roll < 0.83:
            kind = "leaves mid-stream"
            body |= {"stream": True, "max_tokens": 400}
        elif roll < 0.87:
            kind = "leaves early"
            body |= {"max_tokens": 400}
        elif roll < 0.90:
            return "not JSON", target, b'{"model": "toy"', KEY
        elif roll < 0.92:
            kind = "unknown model"
            body["model"] = "other"
        elif roll < 0.94:
            return "no key", target, json.dumps(body).encode(), "sk-wrong"
        elif roll < 0.96:
            kind = "refused by the engine"
            body["max_tokens"] = -1
        elif roll < 0.98:
            kind = "two choices"
            body |= {"n": 2, "stream": draw.random() < 0.5}
        elif roll < 0.99:
            kind = "large"
            body.pop("messages", None)
            body["prompt"] = f"{number} " + "large " * draw.randint(2_000, 14_000)
            target = "/v1/completions"
        else:
            return "own", draw.choice(("/v1/models", "/health", "/metrics")), b"", KEY
        return kind, target, json.dumps(body).encode(), KEY

    async def _one(self, kind: str, target: str, body: bytes, key: str) -> str:
        url = f"http://127.0.0.1:{self._live.port}{target}"
        request = _Request(self._pool, "POST" if body else "GET", url, body, key)
        if kind == "leaves early":
            asking = asyncio.create_task(request.open())
            await asyncio.sleep(self._random.random() * 0.02)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, UpstreamError):
                (await asking).abort()
            return "left"
        async with request as response:
            if kind == "leaves mid-stream":
                for _ in range(self._random.randint(1, 3)):
                    if not await response.next_chunk():
                        return _status(response.status, {200})
                return "left"
            data = await response.read(1 << 26)
        status = response.status
        wanted = {"not JSON": 400, "unknown model": 404, "no key": 401, "refused by the engine": 400}.get(
            kind, 200
        )
        if status != wanted:
            return _status(status, {wanted})
        if status != 200 or kind == "own":
            return f"{status}"
        if (response.header(b"content-type") or b"").startswith(b"text/event-stream"):
            return _stream(data)
        answer = json.loads(data)
        choices = answer.get("choices")
        if not choices or len(choices) != (2 if kind == "two choices" else 1):
            return f"failed: {kind} has the choices {choices}"
        return "200"

    # Trouble

    async def _churn(self) -> None:
        while not self._done.is_set():
            if self.report.requests < self._trouble:
                await asyncio.sleep(0.02)
                continue
            self._trouble = self.report.requests + self._every
            action = self._random.choice((self._kill, self._kill, self._leave, self._freeze, self._switch))
            self.report.churn[action.__name__.strip("_")] += 1
            await action()

    async def _kill(self) -> None:
        """An engine dies; the router finds out by itself, then hears it, then gets the new one."""
        name = self._random.choice(self._in_table)
        self._engines[name].kill()
        await asyncio.sleep(0.1)
        await self._without(name)
        await self._engines[name].start()
        await self._live.tell_table(self._entries())

    async def _without(self, name: str) -> None:
        await self._live.tell_table([entry for entry in self._entries() if entry["name"] != name])

    async def _leave(self) -> None:
        await self._without(self._random.choice(self._in_table))
        await asyncio.sleep(0.2)
        await self._live.tell_table(self._entries())

    async def _freeze(self) -> None:
        engine = self._engines[self._random.choice(self._in_table)]
        engine.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        engine.process.send_signal(signal.SIGCONT)

    async def _switch(self) -> None:
        self._in_table = list(SPLIT if "aggregated-0" in self._in_table else AGGREGATED)
        await self._live.tell_table(self._entries())


class _Request:
    def __init__(self, pool: Pool, method: str, url: str, body: bytes, key: str) -> None:
        self._pool, self._method, self._url, self._body = pool, method, url, body
        self._headers = [
            (b"authorization", b"Bearer " + key.encode()),
            (b"content-type", b"application/json"),
        ]

    async def open(self):  # type: ignore[no-untyped-def]
        return await self._pool.request(self._method, self._url, headers=self._headers, body=self._body)

    async def __aenter__(self):  # type: ignore[no-untyped-def]
        self._response = await self.open()
        return self._response

    async def __aexit__(self, *_: object) -> None:
        self._response.abort()


def _busy(metrics: str) -> list[str]:
    """Gauges that say that something still goes on."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.MULTILINE))
    lines = [line for line in metrics.splitlines() if line and not line.startswith("#")]
    names = [re.split(r"[{ ]", line)[0] for line in lines]
    return [
        line
        for line, name in zip(lines, names, strict=True)
        if kinds.get(name) == "gauge"
        and any(count in name for count in _COUNTS)
        and float(line.rpartition(" ")[2]) != 0
    ]


def _status(status: int, wanted: set[int]) -> str:
    if status in wanted or status in _TROUBLE:
        return f"{status}"
    return f"failed: it was answered {status}"


def _stream(data: bytes) -> str:
    """A stream ends in one of two ways."""
    events = [event for event in data.split(b"\n\n") if event]
    if any(not event.startswith((b"data: ", b":")) for event in events):
        return f"failed: a torn event: {data[-300:]!r}"
    errors = [event for event in events if event.startswith(b'data: {"error"')]
    if events and events[-1] == b"data: [DONE]" and not errors:
        return "200"
    if len(errors) == 1 and errors[0] in events[-2:]:
        return "error event"
    return f"failed: a stream without an end: {data[-300:]!r}"


async def run(requests: int, seed: int = 1, **settings: object) -> Report:
    """A soak of `requests` requests; `settings` are keys of the router's configuration."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = folder / "key"
        key.write_text(KEY)
        live = await LiveRouter(folder, api_key_file=str(key), retries=2, **settings).start()
        try:
            return await Soak(live, folder, requests, seed).run()
        finally:
            await live.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.router.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = {} if args.processes == 1 else {"processes": args.processes}
    report = asyncio.run(run(args.requests, args.seed, **settings))
    print(f"{report.requests} requests in {report.seconds:.0f} s, {sum(report.churn.values())} times trouble")
    print(f"  trouble: {dict(report.churn)}")
    for outcome, count in sorted(report.outcomes.items()):
        print(f"  {outcome}: {count}")
    print(f"  memory: {[size >> 20 for size in report.memory[:: max(1, len(report.memory) // 12)]]} MiB")
    print(f"  open files before and after: {report.files}")
    print(f"  failures: {len(report.failures)}")
    for failure in report.failures[:20]:
        print("  " + failure)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
