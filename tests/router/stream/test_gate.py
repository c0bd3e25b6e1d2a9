"""When the event loop is told that the pump has something to carry."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from .test_pump import Way, chunk, token

ONE = chunk(token("a", [1]))
TRIES = 10_000


@pytest.fixture
def way() -> Iterator[Way]:
    made = Way(wants_ids=False, chat=True)
    yield made
    made.close()


def readable(way: Way, seconds: float = 0.0) -> bool:
    return bool(select.select([way.pump.fileno()], [], [], seconds)[0])


def carry(way: Way) -> bytes:
    way.pump.run()
    return way.read()


def shut(way: Way) -> None:
    """Chunks one right after the other, until one of them has to wait."""
    for _ in range(TRIES):
        way.engine.sendall(ONE)
        if not readable(way):
            return
        assert carry(way)
    raise AssertionError("chunks never came close together")


def test_a_chunk_that_comes_alone_is_carried_at_once(way: Way) -> None:
    assert not readable(way)
    way.engine.sendall(ONE)
    assert readable(way)
    assert carry(way)
    assert not readable(way)


def test_chunks_that_come_close_together_are_carried_together(way: Way) -> None:
    shut(way)
    way.engine.sendall(ONE * 2)
    assert readable(way, 60)
    assert carry(way).count(b"data: ") == 3


def test_when_no_more_has_come_the_next_chunk_does_not_wait(way: Way) -> None:
    shut(way)
    while readable(way, 60) and carry(way):
        pass
    way.engine.sendall(ONE)
    assert readable(way)


def test_a_stream_that_ends_meanwhile_leaves_the_gate_as_it_was(way: Way) -> None:
    shut(way)
    way.pump.remove(way.line)
    assert readable(way, 60)
    way.pump.run()
    assert not readable(way)
    way.pump.add(way.line)
    assert readable(way)
