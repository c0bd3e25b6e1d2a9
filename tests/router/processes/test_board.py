"""Figures shared by the processes of one router."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpcserve.errors import PlanError
from hpcserve.router.board import SLOTS, Board, SharedBoard


@pytest.fixture
def boards() -> Iterator[list[SharedBoard]]:
    first = SharedBoard.create(3)
    boards = [SharedBoard(os.dup(first.fd), processes=3, process=number) for number in range(3)]
    yield boards
    for board in (*boards, first):
        board.close()


def test_a_load_is_the_sum_over_all_processes(boards: list[SharedBoard]) -> None:
    loads = [board.load(7) for board in boards]
    loads[0].add(1, 100, 200)
    loads[2].add(2, prefill_tokens=-30)
    for load in loads:
        assert load.read() == (load.in_flight, load.prefill_tokens, load.kv_tokens) == (3, 70, 200)
    assert boards[0].load(8).in_flight == 0


def test_what_a_dead_process_counted_is_forgotten_and_nothing_else(boards: list[SharedBoard]) -> None:
    for board in boards:
        board.load(0).add(1, 2, 3)
        board.load(SLOTS - 1).add(1, 2, 3)
        board.cell("key alice").add(5)
    boards[0].clear(1)
    for board in boards:
        for slot in (0, SLOTS - 1):
            load = board.load(slot)
            assert (load.in_flight, load.prefill_tokens, load.kv_tokens) == (2, 4, 6)
        assert board.cell("key alice").total == 10


def test_a_cell_is_the_same_in_every_process_whoever_asks_first(boards: list[SharedBoard]) -> None:
    boards[0].cell("a").add(1)
    boards[1].cell("b").add(10)
    boards[2].cell("a").add(2)
    boards[2].cell("b").add(20)
    assert [(board.cell("a").total, board.cell("b").total) for board in boards] == [(3, 30)] * 3


def test_another_process_sees_the_figures(boards: list[SharedBoard]) -> None:
    boards[0].load(3).add(4)
    boards[0].cell("x").add(6)
    code = (
        "import sys\nfrom hpcserve.router.board import SharedBoard\n"
        "board = SharedBoard(int(sys.argv[1]), processes=3, process=1)\n"
        "board.load(3).add(1)\nboard.cell('x').add(1)\n"
        "print(board.load(3).in_flight, board.cell('x').total)\n"
    )
    fd = boards[0].fd
    done = subprocess.run(
        [sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, text=True, timeout=20
    )
    assert done.stdout.split() == ["5.0", "7.0"], done.stderr
    assert (boards[2].load(3).in_flight, boards[2].cell("x").total) == (5, 7)


def test_a_slot_that_does_not_exist_is_an_error(boards: list[SharedBoard]) -> None:
    with pytest.raises(PlanError, match=f"{SLOTS} workers"):
        boards[0].load(SLOTS)


def test_alone_figures_are_plain() -> None:
    board = Board()
    load = board.load(0)
    load.add(1, 2, 3)
    load.add(-1, -2, -3)
    assert load.read() == (load.in_flight, load.prefill_tokens, load.kv_tokens) == (0, 0, 0)
    board.cell("a").add(2)
    assert board.cell("a").total == 2
