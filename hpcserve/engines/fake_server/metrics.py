"""vLLM 0.32's Prometheus metrics that a router, a batch run or a dashboard reads.

Names, labels and buckets are those of vllm/v1/metrics/loggers.py, vllm/v1/metrics/buckets.py and the
NIXL connector's stats.py; the NIXL ones exist only on engines that transfer KV blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from .sequence import FinishReason, Sequence

_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_LATENCY = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_NIXL_TIME = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_NIXL_BYTES = tuple(float(2 ** (10 + i)) for i in range(1, 25, 2))
_NIXL_DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)
_REASONS = ("stop", "length", "abort", "error", "repetition")
_LABELS = ("model_name", "engine")


class Watched(Protocol):
    """What gauges show, read at each scrape."""

    @property
    def running(self) -> int: ...
    @property
    def waiting_for_capacity(self) -> int: ...
    @property
    def loading(self) -> int: ...
    @property
    def loaded(self) -> int: ...
    @property
    def cache_usage(self) -> float: ...


class Metrics:
    """Counters of one engine."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        *,
        transfers: bool,
        blocks: int = 0,
        block_size: int = 0,
        rank: int = 0,
    ) -> None:
        """`blocks` of `block_size` tokens are the KV cache; 0 leaves its size unsaid."""
        self._registry = CollectorRegistry()
        if blocks:
            info = Gauge(
                "vllm:cache_config_info",
                "Information of the LLMEngine CacheConfig",
                ("block_size", "num_gpu_blocks", "engine"),
                registry=self._registry,
            )
            info.labels(str(block_size), str(blocks), str(rank)).set(1)
        self._values = (model_name, str(rank))
        self._transfers = transfers
        lengths = tuple(_one_two_five(max_model_len))
        counter, histogram = self._counter, self._histogram
        self.preemptions = counter("num_preemptions", "Cumulative number of preemption from the engine.")
        self._queries = counter("prefix_cache_queries", "Prefix cache queries, in number of queried tokens.")
        self._hits = counter("prefix_cache_hits", "Prefix cache hits, in number of cached tokens.")
        self._external_queries = counter(
            "external_prefix_cache_queries", "External prefix cache queries, in number of queried tokens."
        )
        self._external_hits = counter(
            "external_prefix_cache_hits", "External prefix cache hits, in number of cached tokens."
        )
        self._prompt_tokens = counter("prompt_tokens", "Number of prefill tokens processed.")
        self._cached_tokens = counter("prompt_tokens_cached", "Number of cached prompt tokens.")
        self._generated = counter("generation_tokens", "Number of generation tokens processed.")
        self._by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            (*_LABELS, "source"),
            registry=self._registry,
        )
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer"):
            self._by_source.labels(*self._values, source)
        self._success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in _REASONS:
            self._success.labels(*self._values, reason)
        self.iteration_tokens = histogram(
            "iteration_tokens_total", "Histogram of number of tokens per engine_step.", _ITERATION
        )
        self._request_prompt = histogram(
            "request_prompt_tokens", "Number of prefill tokens processed.", lengths
        )
        self._request_generated = histogram(
            "request_generation_tokens", "Number of generation tokens processed.", lengths
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", _FIRST_TOKEN
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _TOKEN_LATENCY
        )
        self._per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            _TOKEN_LATENCY,
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _LATENCY
        )
        self._queue_time = histogram(
            "request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _LATENCY
        )
        self._inference_time = histogram(
            "request_inference_time_seconds", "Histogram of time spent in RUNNING phase.", _LATENCY
        )
        self._prefill_time = histogram(
            "request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _LATENCY
        )
        self._decode_time = histogram(
            "request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _LATENCY
        )
        if transfers:
            self._add_nixl()

    def watch(self, scheduler: Watched) -> None:
        """Show the scheduler's queues in gauges."""
        gauge = self._gauge
        gauge("num_requests_running", "Number of requests in model execution batches.").set_function(
            lambda: scheduler.running
        )
        gauge("num_requests_waiting", "Number of requests waiting to be processed.").set_function(
            lambda: scheduler.waiting_for_capacity + scheduler.loading
        )
        gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.").set_function(
            lambda: scheduler.cache_usage
        )
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            (*_LABELS, "reason"),
            registry=self._registry,
        )
        by_reason.labels(*self._values, "capacity").set_function(lambda: scheduler.waiting_for_capacity)
        by_reason.labels(*self._values, "deferred").set_function(lambda: scheduler.loading)
        if not self._transfers:
            return
        by_stage = Gauge(
            "vllm:num_requests_kv_fetch_by_stage",
            "Number of waiting requests by async KV load stage.",
            (*_LABELS, "stage"),
            registry=self._registry,
        )
        by_stage.labels(*self._values, "waiting_to_start").set(0)
        by_stage.labels(*self._values, "in_progress").set_function(lambda: scheduler.loading)
        by_stage.labels(*self._values, "completed_waiting").set_function(lambda: scheduler.loaded)

    def admitted(self, queried: int, hit: int) -> None:
        self._queries.inc(queried)
        self._hits.inc(hit)

    def loaded(self, queried: int, hit: int) -> None:
        self._external_queries.inc(queried)
        self._external_hits.inc(hit)

    def sampled(self, sequence: Sequence, now: float) -> None:
        """A token was sampled at the monotonic time `now` (s)."""
        times = sequence.times
        self._generated.inc()
        if sequence.output_length == 1:
            times.first_token = now
            self._first_token.observe(now - times.arrived)
            self._prompt_done(sequence)
        else:
            self._inter_token.observe(now - times.last_token)
        times.last_token = now

    def finished(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        times = sequence.times
        self._success.labels(*self._values, reason).inc()
        if sequence.output_length == 0:
            return
        self._request_prompt.observe(sequence.prompt_length)
        self._request_generated.observe(sequence.output_length)
        self._end_to_end.observe(now - times.arrived)
        self._queue_time.observe(times.scheduled - times.arrived)
        self._inference_time.observe(now - times.scheduled)
        self._prefill_time.observe(times.first_token - times.scheduled)
        self._decode_time.observe(times.last_token - times.first_token)
        if sequence.output_length > 1:
            self._per_output_token.observe(
                (times.last_token - times.first_token) / (sequence.output_length - 1)
            )

    def transferred(self, *, seconds: float, posted: float, size: int, descriptors: int) -> None:
        """A pull of `size` bytes arrived."""
        self._transfer_time.observe(seconds)
        self._post_time.observe(posted)
        self._transfer_bytes.observe(size)
        self._transfer_descriptors.observe(descriptors)

    def families(self) -> Iterable[Metric]:
        return self._registry.collect()

    def _prompt_done(self, sequence: Sequence) -> None:
        cached = sequence.cached_tokens
        self._prompt_tokens.inc(sequence.prompt_length)
        self._cached_tokens.inc(cached)
        for source, count in (
            ("local_compute", sequence.prompt_length - cached),
            ("local_cache_hit", sequence.local_hit),
            ("external_kv_transfer", sequence.external_hit),
        ):
            self._by_source.labels(*self._values, source).inc(count)

    def _add_nixl(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._transfer_time = histogram(
            "nixl_xfer_time_seconds",
            "Histogram of transfer duration for NIXL KV Cache transfers.",
            _NIXL_TIME,
        )
        self._post_time = histogram(
            "nixl_post_time_seconds",
            "Histogram of transfer post time for NIXL KV Cache transfers.",
            (0.001, *_NIXL_TIME),
        )
        self._transfer_bytes = histogram(
            "nixl_bytes_transferred",
            "Histogram of bytes transferred per NIXL KV Cache transfers.",
            _NIXL_BYTES,
        )
        self._transfer_descriptors = histogram(
            "nixl_num_descriptors",
            "Histogram of number of descriptors per NIXL  KV Cache transfers.",
            _NIXL_DESCRIPTORS,
        )
        self.failed_transfers = counter(
            "nixl_num_failed_transfers",
            "Number of failed NIXL KV Cache transfers, including handshake and notification failures.",
        )
        self.failed_notifications = counter(
            "nixl_num_failed_notifications", "Number of failed NIXL KV Cache notifications."
        )
        self.expired_requests = counter(
            "nixl_num_kv_expired_reqs", "Number of requests that had their KV expire."
        )
        self.notifications_after_expiry = counter(
            "nixl_num_notifications_after_expiry",
            "Number of completion notifications for requests that were no longer tracked.",
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._values)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._values)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, _LABELS, registry=self._registry, buckets=tuple(buckets))
        return metric.labels(*self._values)


class _Together:
    """Several engines' metrics, each under its name once."""

    def __init__(self, engines: Iterable[Metrics]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for engine in self._engines:
            for family in engine.families():
                first = found.setdefault(family.name, family)
                if first is not family:
                    first.samples += family.samples
        return found.values()


def text(engines: Iterable[Metrics]) -> bytes:
    """The body of /metrics."""
    return generate_latest(_Together(engines))


def _one_two_five(largest: int) -> Iterable[float]:
    """1, 2, 5, 10, 20, … up to `largest`."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power > largest:
                return
            yield step * power
        power *= 10
