from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.config.quantities import clock_seconds, format_duration, parse_duration
from hpcserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("90:00", 5400),
        ("12:30:00", 45000),
        ("100:00:00", 360000),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
        ("0-00:00:01", 1),
    ],
)
def test_a_flag_reads_every_form_that_slurm_takes(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "4h", "1.5", "-5", "+5", "1:60", "1:60:00", "1-24", "1-", "-1:00", "1:2:3:4", "1-1:1:1:1",
     "infinite", "UNLIMITED", "१", "1:00\n", "99999999", "1:00 "],
)  # fmt: skip
def test_a_flag_refuses_what_slurm_might_read_otherwise(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_duration(text, what="--walltime")
    assert caught.value.message == (
        f"--walltime: '{text}' is not a duration; allowed: minutes, MM:SS, HH:MM:SS or D-HH[:MM[:SS]]"
    )
    assert caught.value.hint == "For four hours write 04:00:00 or 240."


def test_bare_minutes_are_no_clock() -> None:
    assert clock_seconds("30") is None


@given(st.integers(min_value=0, max_value=9999 * 86400))
def test_what_is_formatted_reads_back_the_same(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00"), (59, "00:00:59"), (86399, "23:59:59"), (86400, "1-00:00:00"), (131415, "1-12:30:15")],
)
def test_formats_as_slurm_prints(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_refuses_to_format_a_negative_duration() -> None:
    with pytest.raises(ValueError, match="can't be negative: -1"):
        format_duration(-1)
