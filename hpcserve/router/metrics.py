"""The router's own figures in Prometheus's text format, under the field's names.

What is counted on the hot path is a `Child` that was looked up before: `child.inc()` and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, Literal

# vLLM's own bounds (v1/metrics/loggers.py), so that the router's figures and the engines' can be compared.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_DECISION_BUCKETS = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1,
)  # fmt: skip

MOST_CHILDREN = 1000
"""Label sets of one counter. What comes later is counted under `other`: labels may name keys or codes."""

Labels = tuple[tuple[str, str], ...]


class Child:
    """One counter with its labels bound."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, by: float = 1) -> None:
        self.value += by


class Counter:
    """A number that grows, per set of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str, *, private: bool = False) -> None:
        self.name = name
        self.text = text
        self.private = private
        """Only the owner of the run sees it."""
        self._children: dict[Labels, Child] = {}

    def child(self, *labels: tuple[str, str]) -> Child:
        """The figure under these labels, to keep: looking it up is what costs."""
        found = self._children.get(labels)
        if found is None:
            if len(self._children) >= MOST_CHILDREN:
                labels = tuple((name, "other") for name, _ in labels)
            found = self._children.setdefault(labels, Child())
        return found

    def add(self, *labels: tuple[str, str]) -> None:
        self.child(*labels).value += 1

    @property
    def total(self) -> float:
        return sum(child.value for child in self._children.values())

    def snapshot(self) -> Any:
        """Plain data for `merge()` in another process."""
        return [(labels, child.value) for labels, child in self._children.items()]

    def merge(self, other: Any) -> None:
        """Add what another process counted."""
        for pairs, value in other:
            self.child(*((name, text) for name, text in pairs)).value += value

    def lines(self, name: str | None = None) -> Iterable[str]:
        values = {labels: child.value for labels, child in self._children.items()}
        yield from _lines(name or self.name, "counter", self.text, values or {(): 0})


class Histogram:
    """How often a figure fell below each bound."""

    kind = "histogram"
    private = False

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.text = text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def snapshot(self) -> Any:
        return [self.counts, self.sum]

    def merge(self, other: Any) -> None:
        counts, total = other
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.sum += total

    def lines(self, name: str | None = None) -> Iterable[str]:
        name = name or self.name
        yield f"# HELP {name} {self.text}"
        yield f"# TYPE {name} histogram"
        running = 0
        for bound, count in zip((*(str(b) for b in self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {running}"


class Gauge:
    """Figures of this moment, made when somebody asks. `over` says what several processes' figures make
    together: their sum, or the largest where all speak of the same thing."""

    private = False

    def __init__(
        self,
        name: str,
        text: str,
        values: Mapping[Labels, float] | None = None,
        *,
        over: Literal["sum", "max"] = "sum",
        kind: Literal["gauge", "counter"] = "gauge",
    ) -> None:
        self.name = name
        self.text = text
        self.values: dict[Labels, float] = dict(values or {})
        self.over = over
        self.kind = kind

    def snapshot(self) -> Any:
        return list(self.values.items())

    def merge(self, other: Any) -> None:
        for pairs, value in other:
            labels = tuple((name, text) for name, text in pairs)
            mine = self.values.get(labels)
            if mine is None:
                self.values[labels] = value
            else:
                self.values[labels] = max(mine, value) if self.over == "max" else mine + value

    def lines(self, name: str | None = None) -> Iterable[str]:
        yield from _lines(name or self.name, self.kind, self.text, self.values)


class Metrics:
    """All counters of one router process."""

    def __init__(self) -> None:
        self.requests = Counter("hpcserve_router_requests_total", "Requests answered, by route and status.")
        self.errors = Counter("hpcserve_router_errors_total", "Failed legs and requests, by reason.")
        self.retries = Counter("hpcserve_router_retries_total", "Legs tried again on another worker.")
        self.cancelled = Counter("hpcserve_router_cancelled_total", "Requests whose client went away.")
        self.refused = Counter(
            "hpcserve_router_requests_shed_total", "Requests refused before any engine saw them, by reason."
        )
        self.kv_legs = Counter(
            "hpcserve_router_kv_legs_total",
            "Answers by where decode workers had the KV from: transferred, or local, with the reason; none"
            " where the prefill worker's token ended the answer.",
        )
        self.broken_streams = Counter(
            "hpcserve_router_broken_streams_total", "Streams that ended with an error after their start."
        )
        self.migrations = Counter(
            "hpcserve_router_migrations_total",
            "Streams whose worker was lost, by how they went on and by what was wrong.",
        )
        self.prompt_tokens = Counter(
            "hpcserve_router_prompt_tokens_total", "Prompt tokens, as engines counted them."
        )
        self.reported_tokens = Counter(
            "hpcserve_router_cache_reported_prompt_tokens_total",
            "Prompt tokens of the requests whose engine said how many of them were cached.",
        )
        self.cached_tokens = Counter(
            "hpcserve_router_cached_tokens_total", "Prompt tokens that engines had in their caches."
        )
        self.predicted_tokens = Counter(
            "hpcserve_router_predicted_cached_tokens_total",
            "Prompt tokens that the router expected to be cached.",
        )
        self.generation_tokens = Counter(
            "hpcserve_router_generation_tokens_total", "Tokens of answers, as engines counted them."
        )
        self.key_requests = Counter(
            "hpcserve_router_key_requests_total", "Requests let in, by the key's name.", private=True
        )
        self.key_tokens = Counter(
            "hpcserve_router_key_tokens_total",
            "Tokens of prompts and answers, by the key's name and their kind.",
            private=True,
        )
        self.ttft = Histogram(
            "hpcserve_router_time_to_first_token_seconds",
            "From a request's arrival to the first byte of its stream.",
            _TTFT_BUCKETS,
        )
        self.itl = Histogram(
            "hpcserve_router_inter_token_latency_seconds",
            "Time between a stream's tokens: its mean, once for each token after the first.",
            _TOKEN_BUCKETS,
        )
        self.tpot = Histogram(
            "hpcserve_router_request_time_per_output_token_seconds",
            "Mean time between the tokens of a stream, once for each stream.",
            _TOKEN_BUCKETS,
        )
        self.latency = Histogram(
            "hpcserve_router_e2e_request_latency_seconds",
            "From a request's arrival to the end of its answer, where the status is 200.",
            _LATENCY_BUCKETS,
        )
        self.queue = Histogram(
            "hpcserve_router_request_queue_time_seconds",
            "Time a request waited for room in the engines.",
            _LATENCY_BUCKETS,
        )
        self.decision = Histogram(
            "hpcserve_router_decision_seconds", "Time to choose a worker, or a pair.", _DECISION_BUCKETS
        )

    def _all(self) -> tuple[Counter | Histogram, ...]:
        found = (value for value in vars(self).values() if isinstance(value, (Counter, Histogram)))
        return tuple(found)

    def snapshot(self) -> dict[str, Any]:
        """All figures as plain data: what one relay sends to another, by way of the supervisor."""
        return {metric.name: metric.snapshot() for metric in self._all()}

    def merge(self, snapshot: Mapping[str, Any]) -> None:
        """Add the figures of another relay, which runs the same code."""
        for metric in self._all():
            metric.merge(snapshot[metric.name])

    def render(self, gauges: Iterable[Gauge] = (), *, private: bool = True, vllm: bool = False) -> str:
        """Everything, plus `gauges`. `private` figures are for the run's owner.

        `vllm` adds the same figures under vLLM's names, for dashboards made for one engine. It has to be
        asked for: where engines are scraped as well, sums over those names would count all things twice.
        """
        metrics: list[Counter | Histogram | Gauge] = [*self._all(), self._hit_rate(), *gauges]
        lines: list[str] = []
        for metric in metrics:
            if private or not metric.private:
                lines += metric.lines()
        if vllm:
            for metric in metrics:
                if metric.name in _VLLM:
                    lines += metric.lines(_VLLM[metric.name])
        return "\n".join(lines) + "\n"

    def _hit_rate(self) -> Gauge:
        prompt, reported = self.prompt_tokens.total, self.reported_tokens.total
        rates: dict[Labels, float] = {}
        if prompt:
            rates[(("of", "predicted"),)] = self.predicted_tokens.total / prompt
        if reported:
            # Engines that don't report their hits must not look as if they had none.
            rates[(("of", "measured"),)] = self.cached_tokens.total / reported
        text = (
            "Part of the prompt tokens that was cached: as engines reported it, and as the router expected."
        )
        return Gauge("hpcserve_router_prefix_hit_rate", text, rates)


_VLLM = {
    "hpcserve_router_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "hpcserve_router_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "hpcserve_router_request_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "hpcserve_router_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "hpcserve_router_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "hpcserve_router_prompt_tokens_total": "vllm:prompt_tokens_total",
    "hpcserve_router_generation_tokens_total": "vllm:generation_tokens_total",
    "hpcserve_router_in_flight": "vllm:num_requests_running",
    "hpcserve_router_queued": "vllm:num_requests_waiting",
}


def _lines(name: str, kind: str, text: str, values: Mapping[Labels, float]) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
        yield f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
