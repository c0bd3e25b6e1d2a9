"""Limits of keys, in one process and in two."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hpcserve.http.errors import HttpError
from hpcserve.router.board import Board, SharedBoard
from hpcserve.router.keys.identity import Identity, Limits
from hpcserve.router.keys.meter import Meter
from hpcserve.router.keys.quota import KeyState, Quota


def key(**limits: int) -> Identity:
    return Identity(key="k", name="alice", limits=Limits(**limits))  # type: ignore[arg-type]


def refused(quota: Quota, identity: Identity, tokens: float, now: float) -> HttpError:
    with pytest.raises(HttpError) as error:
        quota.take(identity, tokens, now)
    return error.value


@pytest.fixture
def two() -> Iterator[tuple[Quota, Quota]]:
    """The quotas of two relays of one endpoint."""
    first = SharedBoard.create(2)
    boards = [SharedBoard(os.dup(first.fd), processes=2, process=number) for number in (0, 1)]
    yield Quota(boards[0], Meter()), Quota(boards[1], Meter())
    for board in (first, *boards):
        board.close()


def test_concurrent_requests_are_limited_over_all_relays(two: tuple[Quota, Quota]) -> None:
    here, there = two
    identity = key(concurrent=2)
    held = [here.take(identity, 10, 0.0), there.take(identity, 10, 0.0)]
    for quota in two:
        error = refused(quota, identity, 10, 0.0)
        assert (error.status, error.code) == (429, "concurrent_requests")
        assert (b"retry-after", b"1") in error.headers
        assert (b"x-hpcserve-reason", b"concurrent_requests") in error.headers
    held[0].give_back(10, 0)
    there.take(identity, 10, 0.0)


def test_tokens_per_minute_fill_again_evenly() -> None:
    quota, identity = Quota(Board(), Meter()), key(tokens_per_minute=600)
    quota.take(identity, 600, 0.0).give_back(600, 600)
    error = refused(quota, identity, 100, 0.0)
    assert (error.status, error.code) == (429, "tokens_per_minute")
    assert (b"retry-after", b"10") in error.headers
    refused(quota, identity, 100, 9.9)
    quota.take(identity, 100, 10.1)


def test_what_a_request_did_not_use_is_given_back() -> None:
    quota, identity = Quota(Board(), Meter()), key(tokens_per_minute=600)
    for _ in range(20):
        quota.take(identity, 500, 0.0).give_back(500, 5)
    refused(quota, identity, 505, 0.0)


def test_a_request_above_the_whole_limit_waits_for_an_empty_bucket() -> None:
    quota, identity = Quota(Board(), Meter()), key(tokens_per_minute=600)
    quota.take(identity, 5000, 0.0)
    refused(quota, identity, 1, 60.0)
    quota.take(identity, 5000, 501.0)


def test_relays_see_each_others_tokens(two: tuple[Quota, Quota]) -> None:
    here, there = two
    identity = key(tokens_per_minute=600)
    for quota in two:
        quota.look([identity], 0.0)
    here.take(identity, 600, 0.0)
    refused(there, identity, 100, 0.5)
    for second in range(1, 61):
        for quota in two:
            quota.look([identity], float(second))
    there.take(identity, 590, 60.0)
    refused(here, identity, 100, 60.0)


def test_steady_use_within_the_limit_is_never_refused_anywhere(two: tuple[Quota, Quota]) -> None:
    here, there = two
    identity = key(tokens_per_minute=6000)
    for second in range(600):
        for quota in two:
            quota.look([identity], float(second))
        here.take(identity, 90, float(second)).give_back(90, 90)
    there.take(identity, 90, 600.0)


def test_total_tokens_count_what_the_ledger_knows_and_what_runs() -> None:
    meter = Meter()
    quota, identity = Quota(Board(), meter), key(tokens_total=1000)
    meter.told({"k": 900})
    state = quota.take(identity, 50, 0.0)
    quota.take(identity, 50, 0.0)
    error = refused(quota, identity, 1, 0.0)
    assert (error.status, error.code) == (403, "token_quota_used_up")
    state.give_back(50, 0)
    quota.take(identity, 10, 0.0)
    meter.count(identity, "m", prompt_tokens=40, cached_tokens=0, completion_tokens=60)
    assert meter.total("k") == 1000
    refused(quota, identity, 1, 0.0)


def test_a_limit_that_changes_while_requests_run_loses_none_of_them() -> None:
    quota = Quota(Board(), Meter())
    held: list[KeyState] = [quota.take(key(concurrent=3), 1, 0.0) for _ in range(3)]
    refused(quota, key(concurrent=2), 1, 0.0)
    for state in held[:2]:
        state.give_back(1, 1)
    quota.take(key(concurrent=2), 1, 0.0)
    refused(quota, key(concurrent=2), 1, 0.0)


def test_models_are_refused_by_name() -> None:
    identity = Identity(key="k", limits=Limits(models=frozenset({"a", "b"})))
    identity.check_model("a")
    with pytest.raises(HttpError) as error:
        identity.check_model("c")
    assert (error.value.status, error.value.code) == (403, "model_not_allowed")
    assert "a, b" in error.value.message
