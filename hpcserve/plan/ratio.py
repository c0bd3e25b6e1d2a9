"""How many nodes (or GPUs of one node) prefill and how many decode.

A pool is large enough when its time per request equals the other's:

    prefill seconds = input_tokens  / prefill rate
    decode seconds  = output_tokens / decode rate

so prefill's share of the GPUs is I/Rp ÷ (I/Rp + O/Rd) with Rp, Rd in tokens per second and GPU:
the balance of DistServe (Zhong et al., OSDI 2024, section 4) with rates from a roofline instead of a
simulation. For N parameters of b bytes, prefill is bound by arithmetic, Rp = e·F / 2N, and decode by
reading the weights once for B requests, Rd = B·e'·W / bN. On an H100 (F = 989 TFLOP/s dense bf16,
W = 3.35 TB/s, data sheet), with e = 0.5, e' = 0.6 and B = 64, Rp/Rd = 3.8: one GPU prefills about
four tokens in the time it decodes one. F/W differs little between A100, H100 and B200.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.model import WorkloadSpec

PREFILL_TOKENS_PER_DECODE_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Share:
    """Prefill's part of the GPUs, and the arithmetic in words."""

    prefill: float
    reason: str


def prefill_share(workload: WorkloadSpec) -> Share:
    given, written = workload.input_tokens, workload.output_tokens
    if given is None or written is None:
        return Share(
            0.5,
            "one to one, rounded towards decode; "
            "workload.input_tokens and workload.output_tokens would steer it",
        )
    work = given / PREFILL_TOKENS_PER_DECODE_TOKEN
    share = work / (work + written)
    return Share(
        share,
        f"{given} input tokens at {PREFILL_TOKENS_PER_DECODE_TOKEN} per decoded token cost {work:.0f}, "
        f"{written} output tokens {written}: {share:.0%} of the GPUs prefill",
    )


def split_nodes(nodes: int, share: float, prefill_step: int, decode_step: int) -> tuple[int, int] | None:
    """Split into whole replicas' worth of nodes (`step` each), at least one replica on each side.

    None when no split uses every node. Of two splits equally near, the one with more decode wins.
    """
    best: tuple[float, int] | None = None
    for prefill in range(prefill_step, nodes - decode_step + 1, prefill_step):
        if (nodes - prefill) % decode_step == 0:
            distance = (round(abs(prefill - share * nodes), 9), prefill)
            best = distance if best is None else min(best, distance)
    return None if best is None else (best[1], nodes - best[1])


def split_slots(slots: int, share: float, prefill_width: int, decode_width: int) -> tuple[int, int] | None:
    """Replicas of each role on one node: first as few idle slots as possible, then nearest to `share`."""
    best: tuple[int, float, int, int] | None = None
    for prefill in range(1, (slots - decode_width) // prefill_width + 1):
        decode = (slots - prefill * prefill_width) // decode_width
        idle = slots - prefill * prefill_width - decode * decode_width
        off = round(abs(prefill * prefill_width - share * slots), 9)
        candidate = (idle, off, prefill, decode)
        best = candidate if best is None else min(best, candidate)
    return None if best is None else (best[2], best[3])
