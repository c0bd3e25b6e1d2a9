"""Traces made up from a seed, for tests and to see how policies fare on other loads."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from .trace import BLOCK_TOKENS, TraceRequest

_RATE = 3.4
"""Requests a second, as in Mooncake's conversation trace."""


def conversation(requests: int, seed: int = 0) -> list[TraceRequest]:
    """Chats that share one first block: some end after a turn, some go on, most prompts are seen once."""
    rng = random.Random(seed)
    ids = itertools.count(1)
    horizon = requests / _RATE
    found: list[TraceRequest] = []
    while len(found) < requests:
        start = rng.random() * horizon
        blocks = [0]
        for turn in itertools.count():
            blocks += _fresh(ids, _size(rng, 14.0 if turn == 0 else 2.0))
            _within(found, _request(start, blocks, _size(rng, 300.0)), horizon)
            if rng.random() > min(0.35 + 0.1 * turn, 0.75):
                break
            start += rng.expovariate(1 / 150.0) + 10.0
    return _ordered(found, requests)


def siblings(requests: int, seed: int = 0) -> list[TraceRequest]:
    """Bursts of requests that share a long system prompt, one of forty; nothing else repeats."""
    rng = random.Random(seed)
    ids = itertools.count()
    prompts = [_fresh(ids, 12 + 4 * number) for number in range(40)]
    found: list[TraceRequest] = []
    now = 0.0
    while len(found) < requests:
        now += rng.expovariate(_RATE / 12)
        system = prompts[min(int(rng.expovariate(0.12)), len(prompts) - 1)]
        for _ in range(rng.randint(4, 20)):
            blocks = [*system, *_fresh(ids, _size(rng, 3.0))]
            found.append(_request(now + rng.random() * 0.5, blocks, _size(rng, 200.0)))
    return _ordered(found, requests)


def agents(requests: int, seed: int = 0) -> list[TraceRequest]:
    """Agents that call the model again and again with a growing prompt, seconds apart."""
    rng = random.Random(seed)
    ids = itertools.count(1000)
    tools = list(range(8))
    horizon = requests / _RATE
    found: list[TraceRequest] = []
    number = 0
    while len(found) < requests:
        now = rng.random() * horizon
        blocks = [*tools, *_fresh(ids, _size(rng, 8.0))]
        number += 1
        for _ in range(rng.randint(3, 30)):
            _within(found, _request(now, blocks, _size(rng, 150.0), f"agent-{number}"), horizon)
            blocks = [*blocks, *_fresh(ids, _size(rng, 2.0))]
            now += 4.0 + rng.expovariate(1 / 12.0)
    return _ordered(found, requests)


def nothing_shared(requests: int, seed: int = 0) -> list[TraceRequest]:
    """Every prompt is new from its first block."""
    rng = random.Random(seed)
    ids = itertools.count()
    found: list[TraceRequest] = []
    now = 0.0
    for _ in range(requests):
        now += rng.expovariate(_RATE)
        found.append(_request(now, _fresh(ids, _size(rng, 20.0)), _size(rng, 300.0)))
    return found


SYNTHETIC: dict[str, Callable[[int, int], list[TraceRequest]]] = {
    "conversation": conversation,
    "siblings": siblings,
    "agents": agents,
    "nothing-shared": nothing_shared,
}


def _fresh(ids: Iterator[int], count: int) -> list[int]:
    return [next(ids) for _ in range(count)]


def _size(rng: random.Random, mean: float) -> int:
    """Mostly small with a long tail, as prompts and answers are; at least 1, at most 12 times the mean."""
    return max(1, min(round(rng.lognormvariate(0.0, 1.0) * mean * 0.607), round(12 * mean)))


def _request(
    arrival: float, blocks: list[int], output_tokens: int, session: str | None = None
) -> TraceRequest:
    return TraceRequest(
        arrival=arrival,
        prompt_tokens=len(blocks) * BLOCK_TOKENS - BLOCK_TOKENS // 2,
        output_tokens=output_tokens,
        blocks=tuple(blocks),
        session=session,
    )


def _ordered(found: list[TraceRequest], count: int) -> list[TraceRequest]:
    return sorted(found, key=lambda request: request.arrival)[:count]


def _within(found: list[TraceRequest], request: TraceRequest, horizon: float) -> None:
    """Keep a request that comes before the trace's end: else its last part would be nothing but returns."""
    if request.arrival < horizon:
        found.append(request)
