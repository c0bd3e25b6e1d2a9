"""A short soak; `python -m tests.router.soak` is the long one."""

from __future__ import annotations

from .soak import run


async def test_soak():
    report = await run(600, seed=4)
    assert report.failures == []
    assert report.requests == 600
    # There was trouble, and most of the load was served all the same.
    assert sum(report.churn.values()) >= 2
    assert report.outcomes["short: 200"] + report.outcomes["stream: 200"] > 300
