"""A replica whose ranks are workers of their own, in `hpcserve status`."""

from __future__ import annotations

import pytest

from hpcserve.cli.status import _by_rank, _replicas


def test_a_row_for_each_replica_with_the_requests_of_its_ranks() -> None:
    replicas = [
        {"name": name, "state": "ready", "node": "n", "url": "http://n:1", "in_rotation": True}
        for name in ("prefill-0", "decode-0")
    ]
    workers = [{"name": "prefill-0", "replica": "prefill-0", "in_flight": 4}]
    workers += [
        {"name": f"decode-0#{rank}", "replica": "decode-0", "in_flight": 3 - rank} for rank in range(2)
    ]
    _, first, second = _replicas(replicas, workers).splitlines()
    assert first.split()[:4] == ["prefill-0", "ready", "n", "4"]
    assert second.split()[:8] == ["decode-0", "ready", "n", "5", "=", "3", "+", "2"]


@pytest.mark.parametrize(
    ("in_flight", "text"),
    [([0], "0"), ([3, 2, 2, 0], "7 = 3 + 2×2 + 0"), ([1] * 64, "64 = 64×1"), ([0, 0], "0 = 2×0")],
)
def test_equal_ranks_in_a_row_are_told_together(in_flight: list[int], text: str) -> None:
    assert _by_rank(in_flight) == text
