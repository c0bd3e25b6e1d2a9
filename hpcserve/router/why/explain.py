"""A placement as JSON, for the response header, `/v1/hpcserve/decisions` and `hpcserve why-route`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from ..call import Call
    from ..placement.decision import Decision

CANDIDATES = 5
_HEADER_MAX = 6000
"""Bytes. Clients and proxies take 8 KiB of headers, all together."""
Json = dict[str, Any]


def explain(decision: Decision) -> Json:
    """Costs and terms are seconds, `decision_us` microseconds."""
    answering, prefill = decision.answering, decision.prefill
    return {
        "worker": answering.name,
        "prefill": None if prefill is None else prefill.name,
        "policy": decision.policy,
        "reason": decision.reason,
        "cached_tokens": decision.cached_tokens,
        "uncached_tokens": decision.uncached_tokens,
        "decision_us": round(decision.seconds * 1e6, 1),
        "candidates": [
            {
                "worker": candidate.worker,
                "cost": _seconds(candidate.cost),
                "terms": {name: _seconds(value) for name, value in candidate.terms.items()},
                "cached_tokens": candidate.cached_tokens,
            }
            for candidate in decision.candidates[:CANDIDATES]
        ],
    }


def header(call: Call) -> bytes:
    """The last placement of a request, as the value of `x-hpcserve-decision`: JSON in ASCII."""
    told = explain(call.decisions[-1]) | {"retries": call.retries, "migrations": call.migrations}
    text = msgspec.json.encode(told)
    while len(text) > _HEADER_MAX and told["candidates"]:
        told["candidates"].pop()
        text = msgspec.json.encode(told)
    # Names of workers are ASCII; should a reason not be, the header must still be one.
    return text.decode().encode("ascii", "backslashreplace")


def _seconds(value: float) -> float:
    """To a microsecond. JSON has no infinity: what can't be had costs -1."""
    return round(value, 6) if abs(value) < 1e12 else -1.0
