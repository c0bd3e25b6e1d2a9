"""Traces are read strictly and made from a seed."""

from __future__ import annotations

import pytest

from hpcserve.bench.replay import bounds, synthetic, trace
from hpcserve.errors import StorageError, UsageError

LINES = """\
{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}
{"timestamp": 0, "input_length": 400, "output_length": 0, "hash_ids": [0], "session_id": 4}
"""


def test_a_mooncake_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(LINES)
    first, second = trace.read(path, speed=2.0)
    assert (first.arrival, first.prompt_tokens, first.output_tokens, first.session) == (0.0, 400, 1, "4")
    assert (second.arrival, second.blocks) == (1.5, (0, 7))
    assert len(trace.read(path, limit=1)) == 1


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(LINES + '{"timestamp": 1}\n')
    with pytest.raises(UsageError, match=r"t\.jsonl:3"):
        trace.read(path)


def test_a_missing_or_empty_trace(tmp_path):
    with pytest.raises(StorageError, match="can't be read"):
        trace.read(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match="no request"):
        trace.read(tmp_path / "empty")


@pytest.mark.parametrize("kind", synthetic.SYNTHETIC)
def test_made_up_traces_are_in_order_and_repeat_with_their_seed(kind):
    made = synthetic.SYNTHETIC[kind](300, 7)
    assert len(made) == 300
    assert made == synthetic.SYNTHETIC[kind](300, 7)
    assert made != synthetic.SYNTHETIC[kind](300, 8)
    assert [request.arrival for request in made] == sorted(request.arrival for request in made)


def test_bounds_are_in_their_order_and_meet_where_nothing_is_evicted():
    made = synthetic.conversation(400, 1)
    small = bounds.shared(made, 500), bounds.foresight(made, 500), bounds.unlimited(made)
    assert small[0] < small[1] <= small[2]
    assert bounds.shared(made, 10**6) == bounds.foresight(made, 10**6) == bounds.unlimited(made)
    assert bounds.unlimited(synthetic.nothing_shared(100, 1)) == 0.0
