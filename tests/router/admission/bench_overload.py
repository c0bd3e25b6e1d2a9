"""Ten times overload, in figures: `python -m tests.router.admission.bench_overload [--seconds 60]`.

Three phases of Poisson arrivals at a real router with fake engines: at the engines' capacity, at ten times of
it, and at half of it. Prints one line each, and as JSON what the router promises: TTFT of accepted requests
next to that at capacity, how long refusals take, the router's memory, and how long recovery takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from .live import Client, Live, Seen

WORDS = 500
PROMPT_TOKENS = 1000
"""Of as many words, as the fake engine counts them."""


async def offer(live: Live, client: Client, *, rate: float, seconds: float, memory: list[float]) -> float:
    """Poisson arrivals, whatever becomes of them. Returns when the phase began."""
    dice = random.Random(7)
    began = time.monotonic()
    at = began
    asked: set[asyncio.Task[Seen]] = set()
    sampled = 0.0
    while (at := at + dice.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        task = asyncio.create_task(live.ask(client, words=WORDS))
        asked.add(task)
        task.add_done_callback(asked.discard)
        if time.monotonic() - sampled > 1.0:
            sampled = time.monotonic()
            memory.append(live.memory())
    await asyncio.gather(*asked)
    return began


def part(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


async def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    live = Live(
        path, engines=args.engines, prefill=args.prefill, processes=args.processes, queue=args.queue_seconds
    )
    client = live.client("bench")
    capacity = args.engines * args.prefill / PROMPT_TOKENS
    found: dict[str, Any] = {"capacity_per_second": capacity, "queue_seconds": args.queue_seconds}
    async with live:
        await offer(live, client, rate=capacity / 4, seconds=5.0, memory=[])
        starts: dict[str, float] = {}
        for name, times, seconds in (
            ("capacity", 1.0, args.seconds),
            ("overload", args.times, args.seconds),
            ("recovery", 0.5, 15.0),
        ):
            memory: list[float] = []
            client.seen.clear()
            starts[name] = await offer(live, client, rate=capacity * times, seconds=seconds, memory=memory)
            ttft = [seen.first for seen in client.accepted()]
            refusals = [seen.first for seen in client.refused()]
            found[name] = {
                "offered": len(client.seen),
                "accepted": len(ttft),
                "accepted_per_second": len(ttft) / seconds,
                "ttft_p50": part(ttft, 0.5),
                "ttft_p99": part(ttft, 0.99),
                "refused": len(refusals),
                "refusal_p50": part(refusals, 0.5),
                "refusal_p99": part(refusals, 0.99),
                "late_refusals": sum(seconds > 0.25 for seconds in refusals),
                "memory_first_mib": memory[0],
                "memory_last_mib": memory[-1],
                "memory_most_mib": max(memory),
            }
            print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
        slow = [
            seen.at + seen.first
            for seen in client.seen
            if seen.status != 200 or seen.first > found["capacity"]["ttft_p99"]
        ]
        found["recovered_after"] = max(slow, default=starts["recovery"]) - starts["recovery"]
    found["ttft_p99_ratio"] = found["overload"]["ttft_p99"] / found["capacity"]["ttft_p99"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of capacity, and of overload")
    parser.add_argument("--times", type=float, default=10.0, help="overload, in capacities")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--prefill", type=float, default=10_000.0, help="tokens a second of an engine")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--queue-seconds", type=float, default=3.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as directory:
        found = asyncio.run(measure(args, Path(directory)))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
