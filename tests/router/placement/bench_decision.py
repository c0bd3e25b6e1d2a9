"""Not a test: the time of a decision and the memory of the index, with many workers and blocks.

    python -m tests.router.placement.bench_decision [--workers 512] [--blocks 10000000]

Most blocks are whole prompts on one worker; fifty beginnings are held by all workers.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import struct
import time
from collections.abc import Callable

from hpcserve.engines.kv_events.messages import KvMessage
from hpcserve.router.demand import Demand
from hpcserve.router.kv.messages import SharedMessage
from hpcserve.router.kv.residency import Residency
from hpcserve.router.placement.placer import Placer
from hpcserve.router.workers import Worker

from .pools import workers

CHUNKS = 94
"""A prompt of 12,000 tokens in chunks of 128, as the index has them."""
SHARED = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--decisions", type=int, default=3000)
    args = parser.parse_args()
    rng = random.Random(1)
    pool = workers(args.workers)
    for worker in pool:
        worker.load.add(rng.randint(0, 20), rng.choice((0, 0, 3_000, 20_000)), rng.random() * 5e5)
    before = _resident()
    residency = Residency(most_units=args.blocks * 3 // 2, most_predicted=args.blocks * 3 // 2)
    began = time.perf_counter()
    beginnings = [_hashes(rng, SHARED) for _ in range(50)]
    kept: list[tuple[int, ...]] = []
    confirmed = 0
    sequence = dict.fromkeys([worker.name for worker in pool], 0)
    while confirmed < args.blocks:
        idle = [worker for worker in pool if not sequence[worker.name]]
        worker = idle[0] if idle else pool[rng.randrange(len(pool))]
        units = [unit for _ in range(16) for unit in _hashes(rng, CHUNKS)]
        first = sequence[worker.name] == 0
        if first:
            units += [unit for beginning in beginnings for unit in beginning]
        packed = struct.pack(f"{len(units)}Q", *units)
        ops = ((("live", 0, b""),) if first else ()) + (("store", 1, packed),)
        residency.apply(KvMessage(worker=worker.name, seq=sequence[worker.name], ops=ops), now=1.0)
        sequence[worker.name] += 1
        confirmed += len(units)
        if len(kept) < 2000:
            kept.append(tuple(units[:CHUNKS]))
    print(f"{residency.stats()} indexed in {time.perf_counter() - began:.0f} s")
    used = _resident() - before
    print(f"index: {used / 1e6:.0f} MB, {used / (confirmed / 1e6) / 1e6:.1f} MB per million blocks")
    # A chunk's hash stands for its unit's here: what counts is that it is looked up.
    for chain in (*beginnings, *kept):
        learned = struct.pack(f"{2 * len(chain)}Q", *[chunk for chunk in chain for _ in range(2)])
        residency.apply(SharedMessage(learned=learned), now=1.0)
    prompts = [
        ("a beginning all hold", lambda: (*rng.choice(beginnings), *_hashes(rng, CHUNKS - SHARED))),
        ("a prompt that one holds", lambda: rng.choice(kept)),
        ("nobody has it", lambda: _hashes(rng, CHUNKS)),
    ]
    matched = [len(residency.matches(make(), now=1.0)) for _, make in prompts]
    print("workers with a match: " + ", ".join(map(str, matched)))
    # As a relay does (process.py): else the collector looks through all of this once in a hundred decisions.
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)
    placer = Placer("kv", residency)
    for name, make in prompts:
        _measure(name, placer, pool, make, args.decisions)
    decode, prefill = workers(args.workers // 2, "decode"), workers(args.workers // 2, "prefill")
    for number, worker in enumerate((*decode, *prefill)):
        worker.domain = f"leaf-{number % 16}"
    _measure("pairs", placer, decode, prompts[0][1], args.decisions, prefill)


def _measure(
    name: str,
    placer: Placer,
    pool: list[Worker],
    make: Callable[[], tuple[int, ...]],
    count: int,
    prefill: list[Worker] | None = None,
) -> None:
    times, cpu = [], []
    for step in range(count):
        demand = _demand(make())
        now = 2.0 + step * 0.001
        began, used = time.perf_counter(), time.thread_time()
        decision = placer.place(demand, answering=pool, prefill=prefill or (), now=now)
        times.append(time.perf_counter() - began)
        cpu.append(time.thread_time() - used)
        assert decision is not None
    for kind, taken in (("wall", sorted(times)), ("CPU", sorted(cpu))):
        middle, late = taken[count // 2], taken[count * 99 // 100]
        print(
            f"{name:24} {kind:4}  p50 {1e6 * middle:5.0f} µs  p99 {1e6 * late:5.0f} µs  {len(pool)} workers"
        )


def _hashes(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple([rng.getrandbits(64) for _ in range(count)])


def _demand(chain: tuple[int, ...]) -> Demand:
    return Demand(prompt_tokens=128 * len(chain), output_tokens=256, chain=chain, chunk_tokens=128.0)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
