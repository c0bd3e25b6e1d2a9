"""Which layout is said to be faster."""

from __future__ import annotations

import msgspec
import pytest

from hpcserve.batch.calibration import rate, verdict

from .test_report import HOUR, PART


def test_a_rate_counts_from_the_first_row_to_the_last_result() -> None:
    found = rate([PART])
    assert found["seconds"] == 4.5 * HOUR
    assert found["rows_per_second"] == pytest.approx(1000 / (4.5 * HOUR), abs=1e-3)
    assert found["tokens_per_second"] == pytest.approx(4e6 / (4.5 * HOUR), abs=0.1)
    assert found["rows_per_gpu_hour"] == pytest.approx(1000 / 72, abs=0.1)
    assert found["advice"].startswith("decode was the narrow place, and prefill was idle 60% of the time")


def test_a_layout_that_needed_two_jobs_has_one_rate() -> None:
    half = msgspec.structs.replace(PART, results=500, tail=2 * HOUR, last_result=2 * HOUR)
    assert rate([half, half])["rows_per_second"] == pytest.approx(1000 / (2 * HOUR), abs=1e-3)


@pytest.mark.parametrize(
    ("disaggregated", "aggregated", "words"),
    [
        (30.0, 20.0, "disaggregated is 1.50 times as fast as aggregated on these rows: write `prefill: {}`"),
        (
            20.0,
            30.0,
            "aggregated is 1.50 times as fast as disaggregated on these rows: write `aggregated: {}`",
        ),
        (20.0, 20.5, "aggregated and disaggregated are equally fast on these rows, within 5%"),
        (0.0, 20.5, "aggregated is the only one that had results"),
    ],
)
def test_verdict(disaggregated: float, aggregated: float, words: str) -> None:
    rates = {
        "disaggregated": {"rows_per_second": disaggregated},
        "aggregated": {"rows_per_second": aggregated},
    }
    assert verdict(rates).startswith(words)
