"""How large the index is and how long a look takes: `python -m tests.router.kv.bench_index [UNITS]`.

512 workers with live events hold UNITS (default ten million) token units; conversations of 70 chunks,
one in five of them with a system prompt that all workers hold, are looked up.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from pathlib import Path

from hpcserve.engines.kv_events.messages import KvMessage, pack
from hpcserve.router.demand import Demand
from hpcserve.router.kv.messages import SharedMessage
from hpcserve.router.kv.residency import Residency

WORKERS = 512
CHUNKS = 70
UNITS_PER_PROMPT = 2 * CHUNKS
SYSTEM_CHUNKS = 8


def main(units: int = 10_000_000) -> None:
    random.seed(1)
    residency = Residency(most_units=max(16_000_000, units * 2), most_translations=4_000_000)
    before = resident()
    began = time.perf_counter()
    shared = hashes(SYSTEM_CHUNKS * 2)
    chains: list[array[int]] = []
    pairs = array("Q")
    system_chain = hashes(SYSTEM_CHUNKS)
    for chunk, unit in zip(system_chain, shared[1::2], strict=True):
        pairs.extend((chunk, unit))
    stored = 0
    each = units // WORKERS
    for worker in range(WORKERS):
        ops = [("clear", 0, b""), ("store", 0, pack(shared)), ("live", 0, b"")]
        residency.apply(KvMessage(worker=f"decode-{worker}", seq=0, ops=tuple(ops)), now=0.0)
        left, seq = each, 1
        while left > 0:
            own = hashes(min(UNITS_PER_PROMPT, left))
            residency.apply(
                KvMessage(worker=f"decode-{worker}", seq=seq, ops=(("store", 0, pack(own)),)), now=0.0
            )
            left -= len(own)
            seq += 1
            stored += len(own)
            if len(chains) < 20_000 and len(own) == UNITS_PER_PROMPT:
                chain = hashes(CHUNKS)
                for chunk, unit in zip(chain, own[1::2], strict=True):
                    pairs.extend((chunk, unit))
                chains.append(array("Q", chain))
    filled = time.perf_counter() - began
    index = resident() - before - (len(pairs) + len(chains) * CHUNKS) * 8
    print(f"units         {len(residency._holders):,} on {WORKERS} workers")
    print(f"memory        {index / stored * 1e6 / 2**20:.1f} MiB for a million units")
    print(f"store         {filled / stored * 1e6:.2f} us a unit")
    start = resident()
    for at in range(0, len(pairs), 2000):
        residency.apply(SharedMessage(learned=pack(pairs[at : at + 2000])), now=0.0)
    translated = resident() - start
    print(f"translations  {len(pairs) // 2:,}, {translated / len(pairs) * 2e6 / 2**20:.1f} MiB for a million")
    times = {"hit": [], "system prompt on all": [], "miss": []}
    for turn in range(20_000):
        chain = tuple(random.choice(chains))
        if turn % 5 == 0:
            kind, chain = "system prompt on all", (*system_chain, *hashes(CHUNKS - SYSTEM_CHUNKS))
        elif turn % 5 == 1:
            kind, chain = "miss", tuple(hashes(CHUNKS))
        else:
            kind = "hit"
        began = time.perf_counter()
        found = residency.matches(chain, now=0.0)
        times[kind].append(time.perf_counter() - began)
        assert len(found) == {"hit": 1, "miss": 0, "system prompt on all": WORKERS}[kind]
    for kind, taken in times.items():
        taken.sort()
        p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
        print(f"matches       p50 {p50 * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us: {kind}")
    began = resident()
    predicted = Residency(most_predicted=1_000_000)
    for worker in range(1000):
        for _ in range(14):
            chain = tuple(hashes(CHUNKS))
            demand = Demand(prompt_tokens=17_500, output_tokens=1, chain=chain, chunk_tokens=250.0)
            predicted.predict(f"decode-{worker % WORKERS}", demand, now=0.0)
    count = predicted.stats()["predicted"]
    print(
        f"predicted     {count:,} chunks, {(resident() - began) / count * 1e6 / 2**20:.0f} MiB for a million"
    )


def hashes(count: int) -> list[int]:
    return [random.getrandbits(64) for _ in range(count)]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
