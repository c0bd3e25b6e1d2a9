"""Kills drivers, engines and the router of a batch with kill -9 at random, and counts its rows afterwards.

    python -m tests.batch.chaos --rows 20000 --kills 200 --jobs 2

Everything is a process of its own, as in a job. What is killed is started again: a driver as the next job
would be, an engine and the router on other ports.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcserve.batch.begin import BatchRequest, Model, begin
from tests.patience import DEADLINE
from tests.router.live import LiveRouter
from tests.router.soak import Engine

ENGINES = ("aggregated-0", "aggregated-1", "aggregated-2", "aggregated-3")
VICTIMS = ("driver", "driver", "engine", "router")
_MODEL = Model(served_name="toy", path="org/toy", revision=None)


@dataclass(slots=True)
class Report:
    """What came of it."""

    rows: int
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    found: collections.Counter[str] = field(default_factory=collections.Counter)
    """custom_id -> lines that have it, in output and errors together."""
    errors: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Every row once."""
        wanted = {f"r{number}" for number in range(self.rows)}
        return set(self.found) == wanted and all(count == 1 for count in self.found.values())

    @property
    def again(self) -> int:
        return int(self.report["computed_more_than_once"])


class Chaos:
    def __init__(self, folder: Path, rows: int, kills: int, jobs: int, seed: int, pace: float) -> None:
        """`pace`: seconds between two kills, about. `jobs` drivers work at the same time."""
        self._folder = folder
        self._kills = kills
        self._pace = pace
        self._random = random.Random(seed)
        self._engines = {name: Engine(name, folder) for name in ENGINES}
        self._router: LiveRouter | None = None
        self._drivers: list[subprocess.Popen[bytes] | None] = [None] * jobs
        self._started = 0
        self._endpoint = folder / "endpoint.json"
        self._out = folder / "out"
        self.report = Report(rows)

    async def run(self) -> Report:
        self._plan()
        began = time.monotonic()
        await asyncio.gather(*(engine.start() for engine in self._engines.values()))
        await self._start_router()
        try:
            while not self._complete():
                self._start_drivers()
                if self.report.kills.total() < self._kills:
                    await asyncio.sleep(self._random.uniform(0.2, 1.8) * self._pace)
                    await self._kill(self._random.choice(VICTIMS))
                else:
                    await asyncio.sleep(0.2)
        finally:
            for driver in self._drivers:
                if driver is not None:
                    driver.kill()
                    driver.wait(DEADLINE)
            for engine in self._engines.values():
                engine.kill()
            if self._router is not None:
                await self._router.stop()
        self.report.seconds = time.monotonic() - began
        self._read()
        return self.report

    def _plan(self) -> None:
        data = self._folder / "data.jsonl"
        with data.open("w") as file:
            for number in range(self.report.rows):
                body = {"model": "x", "prompt": f"row {number} of many", "max_tokens": 1 + number % 24}
                line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        begin(BatchRequest(inputs=[str(data)], output=self._out), _MODEL)

    async def _start_router(self) -> None:
        folder = self._folder / f"router.{self.report.kills['router']}"
        folder.mkdir()
        self._router = await LiveRouter(folder, policy="kv").start()
        await self._router.tell_table(engine.entry for engine in self._engines.values())
        told = {"url": f"http://127.0.0.1:{self._router.port}/v1", "served_name": "toy", "key_file": None}
        new = self._endpoint.with_suffix(".new")
        new.write_text(json.dumps({**told, "end_time": None}))
        os.replace(new, self._endpoint)

    def _start_drivers(self) -> None:
        for place, driver in enumerate(self._drivers):
            if driver is not None and driver.poll() is None:
                continue
            self._started += 1
            argv = [sys.executable, "-m", "hpcserve.batch", "drive", str(self._out)]
            with (self._folder / f"driver.{self._started}.log").open("wb") as log:
                self._drivers[place] = subprocess.Popen(
                    [*argv, "--endpoint", str(self._endpoint)], stdout=log, stderr=log
                )

    async def _kill(self, victim: str) -> None:
        if victim == "driver":
            driver = self._random.choice([one for one in self._drivers if one is not None])
            if driver.poll() is not None:
                return
            driver.kill()
            driver.wait(DEADLINE)
        elif victim == "engine":
            engine = self._random.choice(list(self._engines.values()))
            engine.kill()
            await engine.start()
            assert self._router is not None
            await self._router.tell_table(one.entry for one in self._engines.values())
        else:
            assert self._router is not None
            await self._router.stop()
            self.report.kills["router"] += 1
            await self._start_router()
            return
        self.report.kills[victim] += 1

    def _complete(self) -> bool:
        return (self._out / "output.jsonl").exists() and (self._out / "report.json").exists()

    def _read(self) -> None:
        for name in ("output.jsonl", "errors.jsonl"):
            for line in (self._out / name).read_text().splitlines():
                entry = json.loads(line)
                self.report.found[entry["custom_id"]] += 1
                if name == "errors.jsonl":
                    self.report.errors += 1
                else:
                    self.report.answers[entry["custom_id"]] = entry["response"]["body"]["choices"][0]["text"]
        self.report.report = json.loads((self._out / "report.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), args.rows, args.kills, args.jobs, args.seed, args.pace)
        report = asyncio.run(chaos.run())
    again = f"{report.again} ({report.again / report.rows:.2%})"
    print(f"{report.rows} rows, killed {dict(report.kills)} with {args.jobs} jobs in {report.seconds:.0f} s")
    print(f"each row once: {report.exact}; {report.errors} errors; computed again {again}")
    return 0 if report.exact and not report.errors else 1


if __name__ == "__main__":
    sys.exit(main())
