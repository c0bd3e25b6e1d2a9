"""What is added to a stream's request for engines whose streams nobody goes on with."""

from __future__ import annotations

import pytest

from hpcserve.router.stream.asked import count

COUNT = {"include_usage": True, "continuous_usage_stats": False}


@pytest.mark.parametrize(
    ("given", "options", "wants"),
    [
        ({}, COUNT, False),
        ({"stream_options": None}, COUNT, False),
        ({"stream_options": {"include_usage": False, "x": 1}}, {**COUNT, "x": 1}, False),
        ({"stream_options": {"include_usage": True}}, None, True),
        # The engine has the last word on what is none of the API's.
        ({"stream_options": "odd"}, None, True),
    ],
)
def test_the_engine_is_asked_to_count(given, options, wants):
    asked = count(given)
    assert dict(asked.added) == ({} if options is None else {"stream_options": options})
    assert asked.wants_usage is wants
    # Ids are not asked for, and not taken out either.
    assert asked.wants_ids
