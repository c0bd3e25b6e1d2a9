"""The order in which waiting requests are let in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hpcserve.router.admission.fair_queue import Entry, FairQueue
from hpcserve.router.board import Board, SharedBoard


def queue() -> FairQueue:
    return FairQueue(Board())


def push(
    fair: FairQueue, flow: str, *, times: int = 1, cost: float = 100.0, weight: float = 1.0, priority: int = 0
) -> list[Entry]:
    entries = [Entry(flow, weight=weight, priority=priority, cost=cost) for _ in range(times)]
    for entry in entries:
        fair.push(entry)
    return entries


def order(fair: FairQueue, count: int = 10_000) -> str:
    """The flows in the order in which they are let in."""
    flows: list[str] = []
    while len(flows) < count and (entry := fair.pop()) is not None:
        flows.append(entry.flow)
    return "".join(flows)


def test_one_key_is_served_in_order_of_arrival() -> None:
    fair = queue()
    entries = push(fair, "a", times=5)
    assert [fair.pop() for _ in range(5)] == entries
    assert fair.pop() is None


def test_keys_take_turns_however_many_requests_each_has() -> None:
    fair = queue()
    push(fair, "a", times=100)
    push(fair, "b", times=10)
    assert order(fair, 20).count("b") == 10


def test_shares_are_in_tokens_not_in_requests() -> None:
    fair = queue()
    push(fair, "a", times=100, cost=1000.0)
    push(fair, "b", times=1000, cost=100.0)
    served = order(fair, 550)
    assert abs(served.count("a") * 10 - served.count("b")) <= 10


def test_weights_are_respected() -> None:
    fair = queue()
    push(fair, "a", times=100, weight=3.0)
    push(fair, "b", times=100, weight=1.0)
    assert abs(order(fair, 80).count("a") - 60) <= 1


def test_a_pause_earns_no_credit() -> None:
    fair = queue()
    for _ in range(50):
        fair.charge("a", 1.0, 100.0)
    push(fair, "a", times=20)
    push(fair, "b", times=20)
    assert order(fair, 20).count("b") == 10


def test_what_was_used_before_the_queue_formed_is_not_held_against_a_key_for_ever() -> None:
    fair = queue()
    for _ in range(10_000):
        fair.charge("heavy", 1.0, 1000.0)
    push(fair, "heavy", times=50)
    fair.charge("light", 1.0, 100.0)
    push(fair, "light", times=50)
    assert order(fair, 50).count("heavy") >= 20


def test_a_correction_shifts_the_next_turns() -> None:
    fair = queue()
    push(fair, "a", times=50)
    push(fair, "b", times=50)
    fair.charge("a", 1.0, 1000.0)  # its answer was longer than expected
    assert order(fair, 10) == "b" * 10


def test_interactive_goes_before_batch_and_batch_is_not_starved() -> None:
    fair = queue()
    push(fair, "b", times=100, priority=-1)
    push(fair, "i", times=320, priority=0)
    served = order(fair, 340)
    assert served.startswith("i" * 16)
    assert served.count("b") == 340 // 17
    assert "bb" not in served


def test_batch_has_everything_when_nobody_else_waits() -> None:
    fair = queue()
    push(fair, "b", times=10, priority=-1)
    assert order(fair) == "b" * 10


def test_a_request_that_leaves_leaves_nothing() -> None:
    fair = queue()
    entries = push(fair, "a", times=3) + push(fair, "b", times=2, priority=-1)
    for entry in reversed(entries):
        fair.remove(entry)
        fair.remove(entry)
    assert (fair.waiting, fair.backlog, fair.pop(), list(fair)) == (0, 0.0, None, [])


def test_work_ahead_is_ones_own_backlog_and_a_fair_part_of_the_others() -> None:
    fair = queue()
    push(fair, "a", times=100)
    newcomer = Entry("b", weight=1.0, priority=0, cost=100.0)
    assert fair.ahead(newcomer) <= 200.0  # not the 10,000 tokens that `a` has waiting
    push(fair, "b", times=10)
    assert 1900.0 <= fair.ahead(newcomer) <= 2200.0


@pytest.fixture
def two() -> Iterator[tuple[FairQueue, FairQueue]]:
    """The queues of two processes."""
    first = SharedBoard.create(2)
    boards = [SharedBoard(os.dup(first.fd), processes=2, process=number) for number in range(2)]
    yield FairQueue(boards[0]), FairQueue(boards[1])
    for board in (first, *boards):
        board.close()


def test_counters_are_the_same_in_all_processes(two: tuple[FairQueue, FairQueue]) -> None:
    fair, elsewhere = two
    push(fair, "a", times=20)
    push(fair, "b", times=20)
    for _ in range(10):
        elsewhere.charge("a", 1.0, 100.0)  # let in over there
    elsewhere.settle()
    assert order(fair, 10) == "b" * 10


def test_a_key_that_waits_in_another_process_is_owed_what_it_did_not_get(
    two: tuple[FairQueue, FairQueue],
) -> None:
    fair, elsewhere = two
    push(elsewhere, "few")
    push(fair, "many", times=20)
    assert order(fair, 10) == "many" * 10
    push(fair, "few", times=20)
    assert order(fair, 10) == "few" * 10


def test_a_key_that_waits_nowhere_is_owed_nothing(two: tuple[FairQueue, FairQueue]) -> None:
    fair, elsewhere = two
    push(elsewhere, "few")
    assert order(elsewhere) == "few"
    push(fair, "many", times=30)
    assert order(fair, 10) == "many" * 10
    push(fair, "few", times=20)
    assert order(fair, 10).count("few") in (5, 6)
