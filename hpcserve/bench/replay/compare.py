"""Every policy on one trace, and the bounds beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...errors import UsageError
from . import bounds
from .ours import OURS
from .outcome import ITL_GOAL, TTFT_GOAL, Outcome, measure
from .peers import PEERS
from .simulate import Router, Setup, play
from .trace import BLOCK_TOKENS, TraceRequest

POLICIES: Mapping[str, Callable[[Setup], Router]] = {**OURS, **PEERS}


def compare(
    trace: Sequence[TraceRequest],
    setup: Setup,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The JSON document: `setup`, `trace`, `bounds` and, by policy, the whole run and its second half.

    Raises UsageError for a name in `only` that is not in POLICIES.
    """
    for name in only:
        if name not in POLICIES:
            raise UsageError(
                f"there is no policy {name!r} to replay", hint=f"policies are {', '.join(POLICIES)}"
            )
    half = trace[-1].arrival / 2
    found: dict[str, Any] = {}
    for name in only or POLICIES:
        began = time.monotonic()
        played = play(trace, POLICIES[name](setup), setup)
        found[name] = {
            "whole": _figures(measure(played)),
            "second_half": _figures(measure(played, after=half)),
        }
        say(f"{name}: {time.monotonic() - began:.1f} s")
    blocks = setup.workers * setup.engine.blocks
    return {
        "setup": {
            **asdict(setup),
            "block_tokens": BLOCK_TOKENS,
            "ttft_goal": TTFT_GOAL,
            "itl_goal": ITL_GOAL,
        },
        "trace": {
            "requests": len(trace),
            "seconds": trace[-1].arrival - trace[0].arrival,
            "prompt_tokens": sum(request.prompt_tokens for request in trace),
            "output_tokens": sum(request.output_tokens for request in trace),
        },
        "bounds": {
            "one shared cache": bounds.shared(trace, blocks),
            "one shared cache with foresight": bounds.foresight(trace, blocks),
            "nothing evicted": bounds.unlimited(trace),
        },
        "policies": found,
    }


def _figures(outcome: Outcome) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(outcome).items()}
