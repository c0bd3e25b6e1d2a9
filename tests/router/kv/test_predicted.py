"""Predicted caches lose chunks in the order of a list of single chunks, whatever runs they are kept in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.http.compiled import compiled
from hpcserve.router.kv import predicted as reference
from hpcserve.router.kv.predicted import Predicted

CHUNK_TOKENS = 100.0

marks = compiled("router.kv.marks", "a test")
assert marks is not None, "`make venv` compiles it, with a C compiler and Python's headers"


class OneByOne:
    """What Predicted says it is: for each worker, a list of its least recently used chunks."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.caches: dict[int, OrderedDict[int, None]] = {}
        self.capacity: dict[int, int] = {}

    def add(self, number: int, chain: tuple[int, ...]) -> int:
        held = {chunk for cache in self.caches.values() for chunk in cache}
        seen = next((at for at, chunk in enumerate(chain) if chunk not in held), len(chain))
        cache = self.caches.setdefault(number, OrderedDict())
        for chunk in reversed(chain):
            cache[chunk] = None
            cache.move_to_end(chunk)
        self._shrink(cache, self.capacity.get(number, 5000))
        if sum(map(len, self.caches.values())) > self.most:
            self._shrink(cache, max(self.most // len(self.caches), 1))
        return seen

    def _shrink(self, cache: OrderedDict[int, None], most: int) -> None:
        while len(cache) > most:
            cache.popitem(last=False)

    @property
    def masks(self) -> dict[int, int]:
        masks: dict[int, int] = {}
        for number, cache in self.caches.items():
            for chunk in cache:
                masks[chunk] = masks.get(chunk, 0) | 1 << number
        return masks


def chain(turns: list[int], length: int) -> tuple[int, ...]:
    """Three chunks of each turn, cut at `length`; equal beginnings have equal chunks, nothing else has."""
    chunks, before = [], 1
    for turn in turns:
        for _ in range(3):
            before = before * 7 + turn + 1
            chunks.append(before)
    return tuple(chunks[:length])


workers = st.integers(0, 2)
prompts = st.builds(chain, st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 18))
steps = st.one_of(
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("add"), workers, prompts),
    st.tuples(st.just("capacity"), workers, st.integers(1, 30)),
    st.tuples(st.just("forget"), workers, st.none()),
)


@pytest.fixture(params=["python", "compiled"], scope="module")
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Either way of going over a prompt's chunks."""
    module = reference if request.param == "python" else marks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_loops", lambda: module)
        yield


@settings(max_examples=300)
@given(told=st.lists(steps, max_size=60), most=st.integers(1, 80))
def test_chunks_go_in_the_order_of_their_last_use(
    loops: None, told: list[tuple[str, int, object]], most: int
) -> None:
    predicted, model = Predicted(most=most), OneByOne(most)
    for what, number, value in told:
        if what == "add":
            assert isinstance(value, tuple)
            assert predicted.add(number, value, CHUNK_TOKENS) == model.add(number, value)
        elif what == "capacity":
            assert isinstance(value, int)
            predicted.capacity(number, value * CHUNK_TOKENS)
            model.capacity[number] = value
        else:
            predicted.forget(number)
            model.caches.pop(number, None)
            model.capacity.pop(number, None)
        assert predicted.masks == model.masks
        assert len(predicted) == sum(map(len, model.caches.values()))
        for number, cache in predicted._caches.items():
            # Every chunk is in one run, and every run is found by its first chunk.
            runs = cache.runs
            assert sorted(chunk for run in runs.values() for chunk in run) == sorted(model.caches[number])
            assert cache.first == {run[0]: name for name, run in runs.items()}


@given(told=st.lists(st.tuples(workers, st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=60))
def test_hashes_that_are_the_same_by_chance_break_nothing(
    loops: None, told: list[tuple[int, list[int]]]
) -> None:
    predicted = Predicted(most=30)
    for number in range(3):
        predicted.capacity(number, 8 * CHUNK_TOKENS)
    for number, chunks in told:
        predicted.add(number, tuple(chunks), CHUNK_TOKENS)
        assert len(predicted) == sum(mask.bit_count() for mask in predicted.masks.values()) <= 24
    for number in range(3):
        predicted.forget(number)
    assert len(predicted) == 0 and not predicted.masks


bits = st.sampled_from((1, 2, 4, 1 << 62, 1 << 63, 1 << 64, 1 << 511))


@given(
    st.dictionaries(st.integers(0, 12), st.one_of(bits, st.integers(0, 7), st.just((1 << 70) + 2))),
    st.lists(st.integers(0, 12), max_size=9).map(tuple),
    bits,
    st.integers(0, 9),
)
def test_compiled_loops_do_as_the_python_ones(
    masks: dict[int, int], chain: tuple[int, ...], bit: int, start: int
) -> None:
    start = min(start, len(chain))
    for name in ("mark", "unmark"):
        ours, theirs = dict(masks), dict(masks)
        found = getattr(marks, name)(ours, chain, start, bit)
        assert found == getattr(reference, name)(theirs, chain, start, bit)
        assert ours == theirs
    for any_of in (bit, -1):
        found = marks.leading(masks, chain, any_of, start)
        assert found == reference.leading(masks, chain, any_of, start)
