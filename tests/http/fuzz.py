"""`python -m tests.http.fuzz --requests 100000 --seed 1`: mutated HTTP through a live router.

Each case is made from the seed and its number, so `--first N --requests 1` runs one again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.router.live import LiveRouter

from .fuzz_requests import RequestFuzz, Result
from .fuzz_responses import ResponseFuzz
from .recorder import Recorder

GROWTH = 24 << 20
"""Bytes a router may grow in the second half of a run."""


async def run(kind: str, count: int, seed: int, first: int = 0) -> Result:
    """A router, a recording engine, and `count` cases of one kind: `requests` or `responses`."""
    with tempfile.TemporaryDirectory() as folder:
        live = await LiveRouter(Path(folder)).start()
        recorder = await Recorder().start()
        try:
            fuzz = (RequestFuzz if kind == "requests" else ResponseFuzz)(live, recorder, seed)
            result = await fuzz.run(count, first)
        finally:
            await live.stop()
            await recorder.close()
    middle = len(result.memory) // 2
    if middle and result.memory[-1] > result.memory[middle] + GROWTH:
        result.failures.append(f"memory grew: {[size >> 20 for size in result.memory]} MiB")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.http.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--responses", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args(argv)
    failed = False
    for kind, count in (("requests", args.requests), ("responses", args.responses)):
        if not count:
            continue
        began = time.monotonic()
        result = asyncio.run(run(kind, count, args.seed, args.first))
        print(f"{kind}: {result.cases} cases of seed {args.seed} in {time.monotonic() - began:.0f} s")
        print(f"  served {result.served}, refused or broken off {result.refused}")
        print(f"  by status: {dict(sorted(result.statuses.items()))}")
        print(f"  read more leniently than by h11: {result.excused or 'none'}")
        sizes = [size >> 20 for size in result.memory[:: max(1, len(result.memory) // 10)]]
        print(f"  memory of the router: {sizes} MiB")
        print(f"  failures: {len(result.failures)}")
        for failure in result.failures[:20]:
            print("  " + failure)
        failed = failed or bool(result.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
