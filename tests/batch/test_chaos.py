"""Exactly one row per row, whatever is killed."""

from __future__ import annotations

import pytest

from tests.batch.chaos import Chaos


@pytest.mark.parametrize("jobs", [1, 3])
async def test_every_row_comes_out_once_whoever_is_killed(tmp_path, jobs):
    report = await Chaos(tmp_path, rows=1500, kills=12, jobs=jobs, seed=jobs, pace=0.5).run()
    assert report.exact
    assert report.errors == 0
    assert report.kills.total() >= 3
    assert len(report.answers) == 1500
