"""What is known about a worker: what its engine says of itself, and how quick it has been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PREFILL_TOKENS_PER_S = 8_000.0
"""Until measured: a model of about 70 billion parameters on a node's tensor-parallel pair or quad."""
DECODE_TOKENS_PER_S = 50.0
"""Until measured: tokens a second that one stream gets."""
TRANSFER_BYTES_PER_S = 10e9
"""Until measured: most of a 100 Gb/s link."""
KV_BYTES_PER_TOKEN = 131_072.0
"""Until measured: 32 layers of 8 KV heads of 128 in 16 bits, keys and values."""

_KEPT = 0.98
"""Of the sums at each new sample: they forget within about fifty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One reading of an engine's metrics. None: this engine doesn't say."""

    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    """0 to 1; the fullest where an engine has several data-parallel ranks."""
    kv_tokens: float | None = None
    """Tokens the KV cache holds."""
    block_size: int | None = None
    computed_tokens: float = 0.0
    """Counter: prompt tokens computed here."""
    prefill_seconds: float = 0.0
    """Counter: time requests spent in prefill."""
    token_gaps: float = 0.0
    """Counter: inter-token gaps seen, and below the time they took together."""
    token_gap_seconds: float = 0.0
    transferred_bytes: float = 0.0
    """Counter: KV bytes pulled from other engines, and below the time and tokens."""
    transfer_seconds: float = 0.0
    transferred_tokens: float = 0.0

    @classmethod
    def parse(cls, text: str, rank: int | None = None) -> EngineFacts:
        """From the text of vLLM's or SGLang's /metrics; unknown lines are passed over, and those of other
        data-parallel ranks where `rank` is one.

        Raises ValueError when there is not one metric of an engine in it.
        """
        sums = dict.fromkeys(_SUMMED.values(), 0.0)
        kv_usage = kv_tokens = 0.0
        computed: float | None = None
        cached = prompt = 0.0
        blocks = 0
        block_size: int | None = None
        known = False
        for name, labels, value in _samples(text):
            if rank is not None and labels.get("engine") != str(rank):
                continue
            known = True
            if name in _SUMMED:
                sums[_SUMMED[name]] += value
            elif name in ("kv_cache_usage_perc", "token_usage"):
                kv_usage = max(kv_usage, value)
            elif name == "prompt_tokens_by_source_total":
                if labels.get("source") == "local_compute":
                    computed = (computed or 0.0) + value
            elif name == "prompt_tokens_cached_by_source_total":
                # KV tiers of the engine's own count as external hits as well.
                if labels.get("source") in ("host", "disk"):
                    sums["transferred_tokens"] -= value
            elif name == "prompt_tokens_total":
                prompt += value
            elif name in ("prompt_tokens_cached_total", "cached_tokens_total"):
                cached += value
            elif name == "max_total_num_tokens":
                kv_tokens += value
            elif name == "cache_config_info":
                block_size = _whole(labels.get("block_size")) or block_size
                # One sample per data-parallel rank; the router sees their sum as one worker.
                blocks += _whole(labels.get("num_gpu_blocks")) or 0
        if not known:
            raise ValueError("not one metric of vLLM or SGLang in the engine's /metrics")
        if blocks and block_size:
            kv_tokens = float(blocks * block_size)
        return cls(
            running=sums["running"],
            waiting=sums["waiting"],
            prefill_seconds=sums["prefill_seconds"],
            token_gaps=sums["token_gaps"],
            token_gap_seconds=sums["token_gap_seconds"],
            transferred_bytes=sums["transferred_bytes"],
            transfer_seconds=sums["transfer_seconds"],
            transferred_tokens=sums["transferred_tokens"],
            kv_usage=kv_usage,
            kv_tokens=kv_tokens or None,
            block_size=block_size,
            computed_tokens=computed if computed is not None else max(prompt - cached, 0.0),
        )


_PREFIXES = ("vllm:", "sglang:")
# Both engines' names; the few that both have mean the same.
_SUMMED = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "request_prefill_time_seconds_sum": "prefill_seconds",
    "inter_token_latency_seconds_count": "token_gaps",
    "inter_token_latency_seconds_sum": "token_gap_seconds",
    "nixl_bytes_transferred_sum": "transferred_bytes",
    "nixl_xfer_time_seconds_sum": "transfer_seconds",
    "external_prefix_cache_hits_total": "transferred_tokens",
    # SGLang (observability/metrics_collector.py). A request waits in one queue at a time.
    "num_running_reqs": "running",
    "num_queue_reqs": "waiting",
    "num_prefill_bootstrap_queue_reqs": "waiting",
    "num_decode_prealloc_queue_reqs": "waiting",
    "num_decode_transfer_queue_reqs": "waiting",
}
_NAMES = frozenset(_SUMMED) | {
    "kv_cache_usage_perc",
    "prompt_tokens_by_source_total",
    "prompt_tokens_cached_by_source_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "cache_config_info",
    "token_usage",
    "cached_tokens_total",
    "max_total_num_tokens",
}


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples this module knows, without the engine's prefix."""
    for line in text.splitlines():
        if not line.startswith(_PREFIXES):
            continue
        head, _, number = line.rpartition(" ")
        name, _, labels = head[head.index(":") + 1 :].partition("{")
        if name in _NAMES:
            yield name, _labels(labels.removesuffix("}")), float(number)


def _labels(text: str) -> dict[str, str]:
    """`a="b",c="d"`; no label this module reads has a quote or a comma in its value."""
    found = {}
    for part in text.split('",'):
        name, _, value = part.partition('="')
        found[name.strip()] = value.removesuffix('"')
    return found


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


class Rates:
    """How quick a worker is: what was measured of late, the defaults above until then.

    A rate is the ratio of two sums that slowly forget, so a long measurement counts for more.
    """

    __slots__ = ("_sums", "decode", "kv_bytes_per_token", "prefill", "transfer")

    def __init__(
        self,
        *,
        prefill: float = PREFILL_TOKENS_PER_S,
        decode: float = DECODE_TOKENS_PER_S,
        transfer: float = TRANSFER_BYTES_PER_S,
        kv_bytes_per_token: float = KV_BYTES_PER_TOKEN,
    ) -> None:
        self.prefill = prefill
        """Prompt tokens computed a second."""
        self.decode = decode
        """Tokens a second that one stream gets."""
        self.transfer = transfer
        """KV bytes a second pulled from another worker."""
        self.kv_bytes_per_token = kv_bytes_per_token
        self._sums: dict[str, tuple[float, float]] = {}

    @property
    def measured(self) -> frozenset[str]:
        """Names of the rates that are no defaults any more."""
        return frozenset(self._sums)

    def observe(self, name: str, amount: float, base: float) -> None:
        """`name` is an attribute's; `base` is seconds, or tokens for `kv_bytes_per_token`."""
        if not (amount > 0.0 and base > 0.0):
            return
        amounts, bases = self._sums.get(name, (0.0, 0.0))
        amounts, bases = amounts * _KEPT + amount, bases * _KEPT + base
        self._sums[name] = amounts, bases
        setattr(self, name, amounts / bases)

    def learn(self, before: EngineFacts, after: EngineFacts) -> None:
        """From two readings of one engine. Counters that went back (a restart) teach nothing."""
        for name, above, below in (
            ("prefill", "computed_tokens", "prefill_seconds"),
            ("decode", "token_gaps", "token_gap_seconds"),
            ("transfer", "transferred_bytes", "transfer_seconds"),
            ("kv_bytes_per_token", "transferred_bytes", "transferred_tokens"),
        ):
            amount = getattr(after, above) - getattr(before, above)
            self.observe(name, amount, getattr(after, below) - getattr(before, below))
