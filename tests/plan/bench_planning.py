"""CPU time of planning: `python -m tests.plan.bench_planning`. Not a test: it measures this machine."""

from __future__ import annotations

import time

from .cases import LLAMA_8B, plan, site


def seconds(nodes: int) -> float:
    """Best of five, for nodes of 8 GPUs with one replica per GPU."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        plan(at=site(), nodes=nodes, facts=LLAMA_8B)
        best = min(best, time.process_time() - start)
    return best


if __name__ == "__main__":
    for count in (1, 18, 576, 5760):
        print(f"{count * 8:>6} GPUs  {seconds(count) * 1000:8.2f} ms")
