"""A pace is what was done, over a time long enough to tell."""

from __future__ import annotations

import pytest

from hpcserve.router.admission.budgets import Pace


def looks(pace: Pace, done: list[tuple[float, float]], *, until: float, mean: float) -> None:
    """Look every quarter of a second; `done` are times and the totals from then on."""
    now = 0.0
    while now <= until:
        total = max([amount for at, amount in done if at <= now], default=0.0)
        pace.look(total, now, pressed=True, mean=mean)
        now += 0.25


def test_short_requests_give_a_pace_after_a_second() -> None:
    pace = Pace()
    looks(pace, [(0.25 * n, 1000.0 * n) for n in range(40)], until=1.0, mean=500.0)
    assert pace.measured == pytest.approx(4000.0)


def test_prompts_so_long_that_none_ended_yet_give_no_pace_of_zero() -> None:
    pace = Pace()
    looks(pace, [], until=8.0, mean=100_000.0)
    assert pace.measured is None


def test_long_prompts_are_waited_for() -> None:
    # One of 100,000 tokens every 10 s.
    pace = Pace()
    looks(pace, [(10.0 * n, 100_000.0 * n) for n in range(1, 10)], until=45.0, mean=100_000.0)
    assert pace.measured == pytest.approx(10_000.0, rel=0.5)


def test_a_pace_that_falls_is_seen() -> None:
    pace = Pace()
    quick = [(0.25 * n, 1000.0 * n) for n in range(41)]
    slow = [(10.0 + n, 40_000.0 + 100.0 * n) for n in range(1, 60)]
    looks(pace, quick + slow, until=60.0, mean=100.0)
    assert pace.measured == pytest.approx(100.0, rel=0.3)
