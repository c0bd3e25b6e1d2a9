"""What a router made of a live trace, in figures: times as the trace's own clock would have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..outcome import ITL_GOAL, TTFT_GOAL, quantile
from .fleet import Counted
from .player import Answer
from .scale import Scale

_KINDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOutcome:
    """Seconds of the trace's clock, except where a name says live."""

    requests: int
    errors: int
    failures: dict[str, int]
    """The most frequent ones."""
    hit_rate: float
    """Prompt tokens that were in the cache of the engine asked, of all: the engines' own count."""
    hottest: float
    """Uncached prompt tokens of the engine with most of them, over the mean."""
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float
    """Over the means of single answers."""
    itl_p99: float
    good: float
    """Requests with TTFT and mean ITL within the goals, of all; an error is not good."""
    preempted: int | None
    """None where the engines don't say."""
    late_live_p99: float
    """How much later than due the load generator sent."""


def figures(
    answers: Sequence[Answer], scale: Scale, counted: Sequence[Counted] | None, workers: int
) -> LiveOutcome:
    """`counted`: by engine; None when the answers' own usage is all there is."""
    preempted = None if counted is None else sum(engine.preempted for engine in counted)
    if counted is None:
        counted = _from_usage(answers)
    whole = [answer for answer in answers if answer.failure is None]
    failures = Counter(answer.failure for answer in answers if answer.failure is not None)
    ttft = sorted(scale.trace_seconds(answer.late + (answer.first or 0.0)) for answer in whole)
    itl = sorted(_itl(answer, scale) for answer in whole)
    work = [engine.queried - engine.hit for engine in counted]
    queried = sum(engine.queried for engine in counted)
    return LiveOutcome(
        requests=len(answers),
        errors=len(answers) - len(whole),
        failures=dict(failures.most_common(_KINDS)),
        hit_rate=1.0 - sum(work) / queried if queried else 0.0,
        hottest=max(work, default=0) * workers / max(sum(work), 1),
        ttft_p50=quantile(ttft, 0.5),
        ttft_p90=quantile(ttft, 0.9),
        ttft_p99=quantile(ttft, 0.99),
        itl_p50=quantile(itl, 0.5),
        itl_p99=quantile(itl, 0.99),
        good=sum(_good(answer, scale) for answer in whole) / max(len(answers), 1),
        preempted=preempted,
        late_live_p99=quantile(sorted(answer.late for answer in answers), 0.99),
    )


def _from_usage(answers: Sequence[Answer]) -> list[Counted]:
    found: dict[str | None, Counted] = {}
    for answer in answers:
        before = found.get(answer.worker, Counted())
        found[answer.worker] = Counted(
            queried=before.queried + answer.prompt_tokens, hit=before.hit + answer.cached_tokens
        )
    return list(found.values())


def _itl(answer: Answer, scale: Scale) -> float:
    gaps = answer.tokens - 1
    return scale.trace_itl((answer.last - (answer.first or 0.0)) / gaps) if gaps else 0.0


def _good(answer: Answer, scale: Scale) -> bool:
    ttft = scale.trace_seconds(answer.late + (answer.first or 0.0))
    return ttft <= TTFT_GOAL and _itl(answer, scale) <= ITL_GOAL
